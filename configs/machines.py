"""Machine files: which one a stage runs with, by name, path or what this machine has."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path

from configs.errors import UserError

FOLDER = Path(__file__).parent / "accelerate"
NODES = "_nodes"  # ends the name of the file for several nodes: zero3_nodes beside zero3


def machine_names() -> list[str]:
    """Names of the machine files that ship."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def purpose(path: Path) -> tuple[str, str]:
    """What a machine file is and when to take it: its first two lines; empty where it does not say."""
    lines = path.read_text(encoding="utf-8").splitlines()[:2]
    first, second = ([line[1:].strip() if line.startswith("#") else "" for line in lines] + ["", ""])[:2]
    return first, second


def machine_file(name: str = "auto", processes: int | None = None, nodes: int = 1) -> Path:
    """The Accelerate config that `name` means: auto, a name in configs/accelerate, or a path to a YAML file.

    With several `nodes`, the file that ships for them beside the one that is named. UserError where there is none.
    """
    if name == "auto":
        name = pick_machine(count_gpus(), processes, nodes)
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        if not path.is_file():
            raise UserError(f"machine: {name}: no such file; give a path to an Accelerate config or one of {', '.join(machine_names())}")
        return path
    if name not in machine_names():
        close = difflib.get_close_matches(name, machine_names(), n=1)
        hint = f". Did you mean {close[0]!r}?" if close else ""
        raise UserError(f"machine: found {name!r}; expected auto, {', '.join(machine_names())} or a path to an Accelerate config{hint}")
    if nodes > 1 and not name.endswith(NODES):
        if name + NODES not in machine_names():
            raise UserError(f"machine: {name} is one process, and {nodes} nodes were asked for; take one of {', '.join(for_nodes())}")
        name += NODES
    return FOLDER / f"{name}.yaml"


def for_nodes() -> list[str]:
    """Names of the machine files that ship for several nodes."""
    return [name for name in machine_names() if name.endswith(NODES)]


def pick_machine(gpus: int, processes: int | None = None, nodes: int = 1) -> str:
    """The machine file that fits: every GPU is used unless `processes` (of all nodes) says otherwise; without one, a single CPU process."""
    several = (processes or max(gpus, 1) * nodes) > 1
    name = ("gpu_ddp" if several else "gpu") if gpus else ("cpu_ddp" if several else "cpu")
    return name + NODES if nodes > 1 else name


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
