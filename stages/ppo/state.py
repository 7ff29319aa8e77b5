"""Resumable saves of a PPO run: trained weights, optimizer, KL controller, what its evaluations found, and position.

Prompts, sampling noise and minibatches are functions of seed and iteration, the learning rate of the iteration: none of
them is state. Tensors are kept in safetensors, the rest in JSON: nothing is unpickled on resume. Beside the saves lie the
policies of the best evaluations, best-ITERATION, as long as a save or the run itself may still publish them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from configs.errors import UserError
from stages.ppo import monitor as monitoring
from stages.ppo.modules import PolicyAndValue
from stages.training.save_names import BEST, saves
from stages.training.saves import KEPT, problem, retire, store_alone


class Position(NamedTuple):
    """Where a run stands: iterations that are complete, the KL controller's coefficient, and the monitor's and the guard's state as JSON."""

    iteration: int
    kl_coef: float
    monitor: dict[str, Any] | None = None
    guard: dict[str, Any] | None = None


def trained_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Everything that training changes, by name; tied weights once."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def policy_tensors(module: PolicyAndValue) -> dict[str, torch.Tensor]:
    """What of it is published: the policy's, by name."""
    policy = {id(p) for p in module.policy_parameters()}
    return {name: p for name, p in trained_tensors(module).items() if id(p) in policy}


def writer(
    module: nn.Module, optimizer: Any, position: Position, *, extra: Mapping[str, Mapping[str, torch.Tensor]] | None = None
) -> Callable[[Path], None]:
    """What writes a save into a folder (rank 0). `extra` holds tensors by name of a file of their own, which `load_extra` reads."""
    from safetensors.torch import save_file

    def write(staging: Path) -> None:
        save_file(_on_cpu(trained_tensors(module)), staging / "weights.safetensors")
        save_file(_flat(optimizer.state_dict()["state"]), staging / "optimizer.safetensors")
        for name, tensors in (extra or {}).items():
            save_file(_on_cpu(tensors), staging / f"{name}.safetensors")
        write_position(staging, position)

    return write


def write_position(staging: Path, position: Position) -> None:
    """Where the run stands, into a save that is being written (rank 0)."""
    (staging / "state.json").write_text(json.dumps(position._asdict()))


def save_best(folder: Path, module: PolicyAndValue, iteration: int) -> None:
    """Keep the policy as it is (rank 0), for it is the best so far."""
    write_best(folder, _on_cpu(policy_tensors(module)), iteration)


def write_best(folder: Path, weights: dict[str, torch.Tensor], iteration: int) -> None:
    """Keep a policy's weights (rank 0). One of this number that lies there is of an attempt that was cut."""
    from safetensors.torch import save_file

    store_alone(folder, _best(folder, iteration).name, lambda staging: save_file(weights, staging / "weights.safetensors"))


def load_best(folder: Path, module: PolicyAndValue, iteration: int) -> str | None:
    """Put a kept policy into the module; returns what is wrong with it where that can't be done."""
    weights, why = read_best(folder, iteration)
    if weights is not None:
        _copy(weights, policy_tensors(module))
    return why


def read_best(folder: Path, iteration: int) -> tuple[dict[str, torch.Tensor] | None, str | None]:
    """A kept policy's weights, or None and what is wrong with it."""
    from safetensors.torch import load_file

    kept = _best(folder, iteration)
    why = problem(kept) if kept.is_dir() else "it is not there"
    return (load_file(kept / "weights.safetensors"), None) if why is None else (None, why)


def is_healthy(folder: Path) -> bool:
    """Whether the last optimizer step before a save was taken. Raises OSError, ValueError: its state can't be read."""
    guard = json.loads((folder / "state.json").read_text(encoding="utf-8")).get("guard")
    return not guard or not guard["guard"]["streak"]


def kept_bests(monitor: dict[str, Any] | None) -> tuple[int, ...]:
    """The iterations whose policies may be published by a run that goes on from a save with this monitor's state."""
    return monitoring.State.from_json(monitor).kept(KEPT) if monitor else ()


def forget_bests(folder: Path, current: Sequence[int]) -> None:
    """Remove the kept policies that neither the run as it is (`current`, iterations) nor one of its saves may publish."""
    lists = [current]
    for save in saves(folder):
        with suppress(OSError, ValueError, KeyError, TypeError):  # a damaged save publishes nothing; hashing all of it would cost as much as writing it
            lists.append(kept_bests(json.loads((save / "state.json").read_text())["monitor"]))
    wanted = {_best(folder, iteration).name for bests in lists for iteration in bests}
    for best in folder.glob("best-*"):
        if BEST.fullmatch(best.name) and best.name not in wanted:
            retire(best)


def restore(folder: Path, module: nn.Module, optimizer: Any) -> Position:
    """Load a verified save into the module and the optimizer.

    Raises:
        UserError: it holds other weights than the module trains.
    """
    from safetensors.torch import load_file

    weights, trained = load_file(folder / "weights.safetensors"), trained_tensors(module)
    check_same(folder, {name: tuple(t.shape) for name, t in weights.items()}, {name: tuple(p.shape) for name, p in trained.items()})
    _copy(weights, trained)
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in load_file(folder / "optimizer.safetensors").items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = tensor
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    return Position(**json.loads((folder / "state.json").read_text()))


def check_same(folder: Path, saved: Mapping[str, tuple[int, ...]], trained: Mapping[str, tuple[int, ...]]) -> None:
    """Compare the shapes of a save's weights with those that are trained.

    Raises:
        UserError: they differ.
    """
    other = sorted(n for n in saved.keys() | trained.keys() if saved.get(n) != trained.get(n))
    if other:
        raise UserError(
            f"{folder} holds other weights than this config trains: {', '.join(other[:3])}{' …' if other[3:] else ''}; what is trained can't change within a run: "
            f"put lora, value_function and the models back (with allow_changed: [config]) to continue, or delete {folder.parent} to start anew"
        )


def load_extra(folder: Path, name: str) -> dict[str, torch.Tensor] | None:
    """The extra tensors that a verified save holds under this name; None where it was made without."""
    from safetensors.torch import load_file

    file = folder / f"{name}.safetensors"
    return load_file(file) if file.exists() else None


def _best(folder: Path, iteration: int) -> Path:
    return folder / f"best-{iteration}"


def _copy(weights: dict[str, torch.Tensor], into: dict[str, torch.Tensor]) -> None:
    """Set parameters to what was saved of them."""
    assert set(weights) == set(into), f"the save has other weights than the model: {sorted(set(weights) ^ set(into))[:3]}"
    with torch.no_grad():
        for name, parameter in into.items():
            parameter.copy_(weights[name])


def _on_cpu(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: p.detach().cpu().contiguous() for name, p in tensors.items()}


def _flat(state: dict[int, dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Optimizer state as one level of tensors, "parameter.name"."""
    return _on_cpu({f"{i}.{name}": value for i, entry in state.items() for name, value in entry.items()})

