"""Optional packages: what needs which, and the error that names the extra that brings it."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from configs.errors import MissingExtra

TRACKERS = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}  # value of trainer.report_to -> the packages of which one writes for it


def need(package: str, feature: str, extra: str) -> None:
    """Raise MissingExtra unless `package` can be imported; it is looked for, not imported."""
    if find_spec(package) is None:
        raise MissingExtra(feature, extra)


def check_trainer_packages(trainer: Mapping[str, Any]) -> None:
    """Raise MissingExtra for a tracker or an 8-bit optimizer under `trainer:` whose package is not installed."""
    asked = trainer.get("report_to") or []
    for name in [asked] if isinstance(asked, str) else asked:
        if name in TRACKERS and not any(map(find_spec, TRACKERS[name])):
            raise MissingExtra(f"trainer.report_to: {name}", "trackers")
    optimizer = str(trainer.get("optim") or "")
    if "8bit" in optimizer or "bnb" in optimizer or optimizer.startswith("paged_"):
        need("bitsandbytes", f"trainer.optim: {optimizer}", "quantization")


def check_machine_packages(machine: Mapping[str, Any], file: str) -> None:
    """Raise MissingExtra for a machine file whose engine is not installed."""
    if str(machine.get("distributed_type", "")).upper() == "DEEPSPEED":
        need("deepspeed", f"{file} (distributed_type: DEEPSPEED)", "deepspeed")
