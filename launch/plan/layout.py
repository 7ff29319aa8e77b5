"""How a machine file spreads a stage over processes, as far as memory depends on it."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from configs.errors import UserError
from launch.plan.gpus import CPU, Device

# DeepSpeed's own defaults (deepspeed/runtime/zero/config.py, 0.19.8), in numbers, not bytes.
DEEPSPEED = {
    "reduce_bucket_size": 500_000_000, "allgather_bucket_size": 500_000_000, "stage3_prefetch_bucket_size": 50_000_000,
    "stage3_param_persistence_threshold": 100_000, "stage3_max_live_parameters": 1_000_000_000, "stage3_max_reuse_distance": 1_000_000_000,
}  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """Processes, what is split between them, and the device each of them has."""

    machine: str  # name of the machine file
    processes: int  # of all nodes
    nodes: int
    device: Device
    machine_path: str = ""  # of the machine file
    ddp: bool = False
    zero: int = 0  # DeepSpeed ZeRO stage
    fsdp: bool = False
    offload_optimizer: bool = False
    offload_parameters: bool = False
    overlap: bool | None = None  # DeepSpeed's overlap_comm; None is its default for the stage
    buckets: tuple[tuple[str, int], ...] = ()  # those that the machine file sets

    def numbers(self, name: str, otherwise: int | None = None) -> int:
        """A size of DeepSpeed's settings, in numbers: as the machine file sets it, else `otherwise`, else DeepSpeed's own."""
        return dict(self.buckets).get(name, otherwise if otherwise is not None else DEEPSPEED[name])

    @property
    def split(self) -> int:
        """Processes that share one copy of what is split."""
        return self.processes if self.zero or self.fsdp else 1

    @property
    def overlaps(self) -> bool:
        """Whether gradients are sent while others are computed, from two buffers."""
        return self.zero == 3 if self.overlap is None else self.overlap


def layout_of(machine: Any, device: Device, processes: int, nodes: int) -> Layout:
    """What a machine file (launch/command.py `Machine`) comes to with so many processes of all nodes.

    Raises:
        UserError: a DeepSpeed file that can't be read.
    """
    settings = machine.settings
    kind = str(settings.get("distributed_type", "NO")).upper()
    layout = Layout(machine.path.stem, processes, nodes, device if not (machine.use_cpu and device.gpu) else CPU, machine_path=str(machine.path), ddp=processes > 1)
    if kind == "FSDP":
        offload = bool((settings.get("fsdp_config") or {}).get("fsdp_offload_params"))
        return replace(layout, ddp=False, fsdp=True, offload_optimizer=offload, offload_parameters=offload)
    if kind != "DEEPSPEED":
        return layout
    given = dict(settings.get("deepspeed_config") or {})
    zero = dict(_deepspeed_file(given["deepspeed_config_file"]).get("zero_optimization") or {}) if given.get("deepspeed_config_file") else {}
    stage = int(zero.get("stage") or given.get("zero_stage") or 0)
    given_sizes = {key: value for key, value in zero.items() if key in DEEPSPEED and isinstance(value, int | float)}
    buckets = {key: int(size) for key, size in given_sizes.items()}

    def offloads(what: str) -> bool:
        inside = (zero.get(f"offload_{what}") or {}).get("device")
        return str(inside or given.get(f"offload_{what}_device") or "none").lower() != "none"

    return replace(
        layout, ddp=False, zero=stage, offload_optimizer=offloads("optimizer"), offload_parameters=offloads("param") and stage == 3,
        overlap=zero.get("overlap_comm"), buckets=tuple(buckets.items()),
    )  # fmt: skip


def _deepspeed_file(name: str) -> dict[str, Any]:
    try:
        return dict(json.loads(Path(name).read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise UserError(f"deepspeed_config_file {name} can't be read: {error}; give the path of a DeepSpeed JSON file") from error
