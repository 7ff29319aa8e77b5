"""Machine files: which one a stage runs with, by name, path or what this machine has."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path

from configs.errors import UserError

FOLDER = Path(__file__).parent / "accelerate"


def machine_names() -> list[str]:
    """Names of the machine files that ship."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def machine_file(name: str = "auto", processes: int | None = None) -> Path:
    """The Accelerate config that `name` means: auto, a name in configs/accelerate, or a path to a YAML file.

    UserError where there is none.
    """
    if name == "auto":
        name = pick_machine(count_gpus(), processes)
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        if not path.is_file():
            raise UserError(f"machine: {name}: no such file; give a path to an Accelerate config or one of {', '.join(machine_names())}")
        return path
    if name not in machine_names():
        close = difflib.get_close_matches(name, machine_names(), n=1)
        hint = f". Did you mean {close[0]!r}?" if close else ""
        raise UserError(f"machine: found {name!r}; expected auto, {', '.join(machine_names())} or a path to an Accelerate config{hint}")
    return FOLDER / f"{name}.yaml"


def pick_machine(gpus: int, processes: int | None = None) -> str:
    """The machine file that fits: every GPU is used unless `processes` says otherwise; without one, a single CPU process."""
    if gpus:
        return "gpu_ddp" if (processes or gpus) > 1 else "gpu"
    return "cpu_ddp" if (processes or 1) > 1 else "cpu"


def count_gpus() -> int:
    """NVIDIA GPUs that a process started now would see, without importing torch (seconds)."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = [p for p in Path("/dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", p.name)]
    if visible is None or not devices:
        return len(devices)
    chosen = []
    for item in visible.split(","):
        if item.strip() in ("", "-1"):
            break  # CUDA reads the list up to the first entry that is none
        chosen.append(item)
    return len(chosen)
