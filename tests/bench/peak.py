"""Peak resident memory of a process above what it had at a chosen moment, as the kernel counts it (Linux)."""

from __future__ import annotations

import ctypes
import gc
import os
import re
from pathlib import Path

# The same in every process that is compared: large blocks go back to the kernel when they are freed, so that the peak is what
# is alive at once and not what the allocator kept.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576", "MALLOC_ARENA_MAX": "2"}


def environment() -> dict[str, str]:
    """What a measured process is started with."""
    quiet = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_TELEMETRY": "1"}
    return os.environ | quiet | MALLOC | {"CUDA_VISIBLE_DEVICES": ""}


def baseline() -> float:
    """Forget the peak so far; the resident memory of now, MiB. Call it after every import."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to the present size
    return _status("VmRSS")


def peak() -> float:
    """The highest resident memory since `baseline`, MiB."""
    return _status("VmHWM")


def _status(key: str) -> float:
    found = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found, f"/proc/self/status has no {key}"
    return int(found[1]) / 1024
