"""DeepSpeed engines made directly, without Accelerate's `prepare`: it takes one model per run, and PPO has up to five.

What the machine file says of ZeRO is in every engine's config; batch sizes, clipping and accumulation are ours (stages/ppo/zero/trained.py).
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from configs.errors import UserError
from configs.schema import PPOStage
from configs.splitting import refused
from stages.zero import load, machine

BUCKET = 2**26  # numbers reduced at once where the machine file does not say; DeepSpeed's own 5e8 would be 2 GB for every engine


@dataclass(frozen=True)
class Zero:
    """The machine file's ZeRO stage and settings."""

    stage: int
    settings: dict[str, Any]  # the `zero_optimization` section of DeepSpeed's config

    @property
    def splits_weights(self) -> bool:
        """Whether no process holds a whole model (stage 3)."""
        return self.stage == 3

    def config(self, *, training: bool) -> dict[str, Any]:
        """A DeepSpeed config. Gradients are accumulated, clipped and judged by us, so DeepSpeed is told of a single micro-batch and no norm."""
        settings = copy.deepcopy(self.settings)
        if not training:
            settings.pop("offload_optimizer", None)
        return {
            "zero_optimization": settings, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "gradient_clipping": 0.0,
            "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False, "steps_per_print": 2**62,
        }  # fmt: skip


def zero_of_machine(cfg: PPOStage) -> Zero | None:
    """What the machine file asks for, or None without DeepSpeed.

    Raises:
        UserError: something that PPO can't do under it.
    """
    load.withdraw()
    plugin = machine.plugin()
    if plugin is None:
        return None
    section = plugin.hf_ds_config.config.get("zero_optimization") or {}
    settings = {key: value for key, value in section.items() if value != "auto"}
    zero = Zero(int(settings.get("stage", 0)), settings)
    _check(cfg, zero)
    # Hooks would miss what an earlier backward pass of the same step left (ZeRO-1): policy and value function have a pass each.
    settings.setdefault("reduce_bucket_size", BUCKET)
    if zero.stage < 3:
        settings["overlap_comm"] = False
    else:
        # PPO's passes take turns (policy, value function, reference, scores): what DeepSpeed fetches ahead by the last pass's order is not what
        # the next one needs, and processes have been seen to fetch different things.
        settings |= {"stage3_prefetch_bucket_size": 0, "stage3_max_reuse_distance": 0}
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message="`torch.distributed", category=FutureWarning)  # DeepSpeed's use of collectives, at every call
    return zero


def _check(cfg: PPOStage, zero: Zero) -> None:
    offload = (zero.settings.get("offload_optimizer") or {}).get("device", "none")
    problem = None if 1 <= zero.stage <= 3 else f"ZeRO stage {zero.stage}: PPO has gradients of its own to sum, which needs stage 1, 2 or 3"
    if problem := problem or refused(cfg, zero.stage, offload_optimizer=offload):
        raise UserError(f"stage ppo under this machine file: {problem}")


class Calls(nn.Module):
    """What an engine holds: a module whose methods are called by name, all through one `forward`, as an engine has no other.

    `head` is a policy's output head that those methods read without calling it: DeepSpeed keeps its weight whole while they run.
    """

    def __init__(self, inner: nn.Module, arithmetic: Callable[[], AbstractContextManager[Any]], head: nn.Module | None = None) -> None:
        super().__init__()
        self.inner, self.arithmetic = inner, arithmetic
        self.reads = tuple(head.parameters()) if head is not None else ()

    def forward(self, method: str, **arguments: Any) -> Any:
        """What the module's `method` returns. An autocast begins in here, as DeepSpeed ends one that surrounds its engines."""
        with self.arithmetic():
            return getattr(self.inner, method)(**arguments)


class Unhooked:
    """A policy's output head without DeepSpeed's hooks: it is used in chunks, of which every process has another number."""

    def __init__(self, model: Any) -> None:
        head = model.get_output_embeddings()
        self.config = model.config
        self.head = copy.deepcopy(head, {id(p): p for p in head.parameters()})  # a module of its own around the same parameters

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.head


def engine_of(calls: nn.Module, zero: Zero, optimizer: torch.optim.Optimizer | None = None) -> Any:
    """An engine that trains what the optimizer has, or (ZeRO-3) one that only splits a frozen module's weights. A collective."""
    import deepspeed

    training = {"optimizer": optimizer} if optimizer is not None else {}
    engine, *_ = deepspeed.initialize(model=calls, config=zero.config(training=optimizer is not None), **training)
    if zero.splits_weights:
        for module in calls.modules():
            for parameter in module.reads if isinstance(module, Calls) else ():
                deepspeed.zero.register_external_parameter(module, parameter)
    return engine


def split(model: Any, zero: Zero | None) -> Any:
    """Split a loaded model's weights over the processes, at ZeRO-3; as it is otherwise. Each process keeps its share. A collective."""
    if zero is not None and zero.splits_weights:
        import deepspeed

        deepspeed.zero.Init(module=model, config_dict_or_path=zero.config(training=False))
        device = deepspeed.get_accelerator().current_device_name()
        for buffer in model.buffers():  # which it leaves where they were loaded
            buffer.data = buffer.data.to(device)
    return model


def unique(things: Iterable[Any]) -> list[Any]:
    """Each thing once, in order."""
    return list({id(thing): thing for thing in things}.values())
