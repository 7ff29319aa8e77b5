"""The other processes that the same launcher started on this machine, as Linux's /proc shows them."""

from __future__ import annotations

import os

from stages.processes import children, environment, state

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
