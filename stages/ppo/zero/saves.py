"""Resumable saves of a sharded run: every process calls these, rank 0 writes what is whole.

A save holds the trained weights as the plain one does (stages/ppo/state.py), and the optimizer's state as one file per process: to put those
together would need every process's memory at once. So it is continued under the same number of processes and the same ZeRO stage.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from configs.errors import UserError
from stages.ppo import state as saved
from stages.ppo.modules import PolicyAndValue
from stages.ppo.state import Position, policy_tensors, trained_tensors
from stages.ppo.store import Store
from stages.training.ranks import from_rank_0, rank, world_size
from stages.training.saves import Failure, attempted
from stages.zero.gather import is_split, shape, state, whole

SHARDS = "shards.json"  # in a save: the ZeRO stage and the number of processes


class ShardedStore(Store):
    """The store of a module in engines."""

    def __init__(self, folder: Path, module: PolicyAndValue, optimizer: Any, depends_on: Mapping[str, Any], resumed_from: Path | None, stage: int) -> None:
        super().__init__(folder, module, optimizer, depends_on, resumed_from)
        self.stage = stage

    def writer(self, position: Position, extra: Mapping[str, Mapping[str, Tensor]]) -> Callable[[Path], Failure | None]:
        """What writes this process's part of a save into a folder: its share of the optimizer's state, and on rank 0 what is whole. A collective itself."""
        from safetensors.torch import save_file

        weights, shard = whole_tensors(self.module, trained_tensors(self.module)), self.optimizer.shard()

        def write(staging: Path) -> None:
            save_file(shard, staging / shard_file(rank()))
            if rank():
                return
            save_file(weights, staging / "weights.safetensors")
            for file, tensors in extra.items():
                save_file({key: tensor.detach().to("cpu", copy=True) for key, tensor in tensors.items()}, staging / f"{file}.safetensors")
            (staging / SHARDS).write_text(json.dumps({"stage": self.stage, "processes": world_size()}))
            saved.write_position(staging, position)

        return lambda staging: attempted(lambda: write(staging))

    def save_best(self, iteration: int, kept: Sequence[int]) -> None:
        """Keep the policy as it is, one of `kept`."""
        weights = whole_tensors(self.module, policy_tensors(self.module))
        self.keep_best(iteration, kept, lambda: saved.write_best(self.folder, weights, iteration))

    def load_best(self, iteration: int) -> str | None:
        """Put a kept policy into the module, for good: the optimizer's own copy of the weights stays as it is."""
        weights: dict[str, Tensor] | None = None

        def read() -> str | None:
            nonlocal weights
            weights, why = saved.read_best(self.folder, iteration)
            return why

        why = from_rank_0("loading the best policy", read)
        if why is None:
            put(weights, policy_tensors(self.module))
        return why

    def restore(self, save: Path) -> None:
        """Put a verified save's weights and optimizer state into the run as it goes on; DeepSpeed's own copy of the weights too."""
        restore_weights(save, self.module)
        for engine in self.optimizer.engines:
            engine.optimizer.refresh_fp32_params()
        restore_optimizer(save, self.optimizer)

    def is_finite(self, *, whole: bool = False) -> bool:
        """Whether every number of the policy, or of all that is trained, is finite in every process's share."""
        tensors = trained_tensors(self.module) if whole else policy_tensors(self.module)
        return not _anywhere(any(not bool(torch.isfinite(getattr(p, "ds_tensor", p).detach()).all()) for p in tensors.values()))


def whole_tensors(module: nn.Module, names: Container[str]) -> dict[str, Tensor]:
    """Copies of a module's whole parameters of these names in main memory; empty on every process but rank 0. A collective."""
    return state(module, lambda name, _: name in names) or {}


@torch.no_grad()
def put(weights: Mapping[str, Tensor] | None, parameters: Mapping[str, Any]) -> None:
    """Set parameters to whole tensors that rank 0 has (`weights` elsewhere is not looked at). A collective."""
    for name, parameter in parameters.items():
        with whole([parameter], changed=True):
            if rank() == 0:
                assert weights is not None
                parameter.copy_(weights[name])
            if not is_split(parameter):
                torch.distributed.broadcast(parameter.detach(), src=0)


def shard_file(number: int) -> str:
    """The file of a process's share of the optimizer's state."""
    return f"optimizer-{number:05d}.safetensors"


def _anywhere(found: bool) -> bool:
    """Whether something is so on any process. A collective."""
    every: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(every, found)
    return any(every)


def check(folder: Path, stage: int) -> None:
    """Refuse a verified save that was made under another ZeRO stage or number of processes (`stage` 0: this run is without DeepSpeed).

    Raises:
        UserError: naming both.
    """
    file = folder / SHARDS
    made = json.loads(file.read_text()) if file.exists() else {"stage": 0, "processes": world_size()}
    now = {"stage": stage, "processes": world_size()}
    if made != now and (made["stage"] or stage):
        words = [f"ZeRO-{x['stage']} on {x['processes']} process(es)" if x["stage"] else "no ZeRO" for x in (made, now)]
        raise UserError(
            f"{folder} was saved under {words[0]}, and this run has {words[1]}: the optimizer's state lies in one part for each process and can't be cut anew; "
            f"continue with the machine file and number of processes that it was made with, or delete {folder.parent} to start anew"
        )


def restore_weights(folder: Path, module: PolicyAndValue) -> Position:
    """Load a verified save's weights into a module that is not engaged yet. A collective.

    Raises:
        UserError: it holds other weights than the module trains.
    """
    from safetensors.torch import load_file

    weights = load_file(folder / "weights.safetensors") if rank() == 0 else None
    trained = trained_tensors(module)
    shapes = {name: tuple(shape(p)) for name, p in trained.items()}
    from_rank_0("resuming", lambda: saved.check_same(folder, {name: tuple(t.shape) for name, t in (weights or {}).items()}, shapes))
    put(weights, trained)
    return Position(**json.loads((folder / "state.json").read_text()))


def restore_optimizer(folder: Path, optimizer: Any) -> None:
    """Load this process's part of a verified save's optimizer state."""
    from safetensors.torch import load_file

    optimizer.load_shard(load_file(folder / shard_file(rank())))
