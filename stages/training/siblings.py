"""The other processes that the same launcher started on this machine, as Linux's /proc shows them."""

from __future__ import annotations

import os
from pathlib import Path

LAUNCHED_BY_TORCH = "TORCHELASTIC_RUN_ID"


def siblings() -> dict[int, int]:
    """Rank -> process id of the living processes of this launch on this machine but this one; empty where no torchrun started it."""
    run = os.environ.get(LAUNCHED_BY_TORCH)
    if run is None:
        return {}
    found = {}
    for child in children(os.getppid()):
        variables = environment(child) if child != os.getpid() and state(child)[:1] not in ("", "Z") else {}
        if variables.get(LAUNCHED_BY_TORCH) == run and "RANK" in variables:
            found[int(variables["RANK"])] = child
    return found


def one_is_gone() -> bool:
    """Whether a process of this launch on this machine has ended; False where that can't be told."""
    if LAUNCHED_BY_TORCH not in os.environ or os.getpid() not in children(os.getppid()):  # without such a list in /proc, or under a wrapper, nobody is seen
        return False
    return len(siblings()) + 1 < int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def children(pid: int) -> list[int]:
    """Process ids of a process's children; empty where it has gone, or where there is no /proc."""
    out: list[int] = []
    for thread in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            out += map(int, thread.read_text().split())
        except OSError:
            continue
    return out


def environment(pid: int) -> dict[str, str]:
    """The variables that a process of this user was started with; empty where they can't be read."""
    try:
        entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return {}
    return dict(entry.decode(errors="replace").split("=", 1) for entry in entries if b"=" in entry)


def state(pid: int) -> str:
    """What the kernel says a process does, such as "S (sleeping)" or "T (stopped)"; empty where it has gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("State:")), "")
