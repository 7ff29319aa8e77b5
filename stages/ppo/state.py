"""Resumable saves of a PPO run: trained weights, optimizer, KL controller and position, and nothing that a seed can redraw.

Prompts, sampling noise and minibatches are functions of seed and iteration, the learning rate of the iteration: none of
them is state. Tensors are kept in safetensors, the rest in JSON: nothing is unpickled on resume.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from stages.training.resume import saves, seal

KEPT = 2  # saves: the newest, and one to fall back to when it is damaged


class Position(NamedTuple):
    """Where a run stands: iterations that are complete, and the KL controller's coefficient."""

    iteration: int
    kl_coef: float


def trained_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Everything that training changes, by name; tied weights once."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def save(
    folder: Path, module: nn.Module, optimizer: Any, position: Position, *, extra: Mapping[str, Mapping[str, torch.Tensor]] | None = None
) -> None:
    """Write a sealed save (rank 0): staged under another name, renamed when it is whole. Older ones go after that.

    `extra` holds tensors by name of a file of their own, which `load_extra` reads.
    """
    from safetensors.torch import save_file

    staging, final = folder / f".staging-{position.iteration}", folder / f"checkpoint-{position.iteration}"
    for left in folder.glob(".staging-*"):
        shutil.rmtree(left)
    staging.mkdir(parents=True)
    save_file({n: p.detach().cpu().contiguous() for n, p in trained_tensors(module).items()}, staging / "weights.safetensors")
    save_file(_flat(optimizer.state_dict()["state"]), staging / "optimizer.safetensors")
    for name, tensors in (extra or {}).items():
        save_file({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, staging / f"{name}.safetensors")
    (staging / "state.json").write_text(json.dumps(position._asdict()))
    seal(staging)
    if final.exists():
        shutil.rmtree(final)
    staging.rename(final)
    _sync_folder(folder)
    for old in saves(folder)[KEPT:]:
        shutil.rmtree(old)


def restore(folder: Path, module: nn.Module, optimizer: Any) -> Position:
    """Load a verified save into the module and the optimizer."""
    from safetensors.torch import load_file

    weights = load_file(folder / "weights.safetensors")
    trained = trained_tensors(module)
    assert set(weights) == set(trained), f"the save has other weights than the model: {sorted(set(weights) ^ set(trained))[:3]}"
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(weights[name])
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in load_file(folder / "optimizer.safetensors").items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = tensor
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    return Position(**json.loads((folder / "state.json").read_text()))


def load_extra(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """The extra tensors that a verified save holds under this name."""
    from safetensors.torch import load_file

    return load_file(folder / f"{name}.safetensors")


def _flat(state: dict[int, dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Optimizer state as one level of tensors, "parameter.name"."""
    return {f"{i}.{name}": value.detach().cpu().contiguous() for i, entry in state.items() for name, value in entry.items()}


def _sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
