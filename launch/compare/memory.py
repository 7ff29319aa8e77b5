"""The most memory that a process has held since a chosen moment."""

from __future__ import annotations

import contextlib
import gc
import re
import resource
from pathlib import Path

MIB = 2**20


def start() -> float:
    """Forget the peak so far, where the kernel allows it; the resident memory of now, bytes."""
    import psutil
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to the present size
    return float(psutil.Process().memory_info().rss)


def above(before: float) -> float:
    """Bytes: on a GPU the most that was allocated there, else the highest resident memory above `before`."""
    import torch

    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated())
    with contextlib.suppress(OSError):
        if found := re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE):
            return int(found[1]) * 1024 - before
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
