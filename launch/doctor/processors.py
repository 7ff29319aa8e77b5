"""Processors and memory: what there is, and what affinity and cgroups leave of it."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from launch.doctor.check import Findings, Settings

GIB = 2**30


def usable_cores() -> float:
    """Cores that this process may keep busy: the smaller of its affinity and its cgroup's quota."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _ = cgroup_limits()
    return min(allowed, quota) if quota else allowed


def cgroup_limits(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> tuple[float | None, int | None]:
    """(CPU quota in cores, memory limit in bytes) of our cgroup and those above it; None where there is no limit. Reads cgroups v1 and v2."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return None, None
    cores: list[float] = []
    memory: list[int] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        names = controllers.split(",")
        for base, wanted in ((root, not controllers), (root / "cpu", "cpu" in names), (root / "memory", "memory" in names)):
            if wanted:
                for folder in _upwards(base, path):
                    cores += _quota(folder)
                    memory += _bytes(folder)
    return min(cores, default=None), min(memory, default=None)


def usable_memory() -> int:
    """Bytes of main memory that this machine has, or that our cgroup may take of it."""
    import psutil

    total = int(psutil.virtual_memory().total)
    return min(total, cgroup_limits()[1] or total)


def _upwards(base: Path, path: str) -> list[Path]:
    """The folder of a cgroup and of those above it. In a container the path may be the host's and the folder the root's."""
    parts = [part for part in path.split("/") if part not in ("", "..")]
    return [base.joinpath(*parts[:length]) for length in range(len(parts), -1, -1)]


def _quota(folder: Path) -> list[float]:
    words = _words(folder / "cpu.max") or _words(folder / "cpu.cfs_quota_us") + _words(folder / "cpu.cfs_period_us")
    if len(words) < 2 or words[0] in ("max", "-1"):
        return []
    return [int(words[0]) / int(words[1])]


def _bytes(folder: Path) -> list[int]:
    words = _words(folder / "memory.max") or _words(folder / "memory.limit_in_bytes")
    return [int(words[0])] if words and words[0] != "max" and int(words[0]) < 2**60 else []


def _words(file: Path) -> list[str]:
    try:
        return file.read_text().split()
    except OSError:
        return []


def check_processors(_: Settings) -> Findings:
    """CPU model, cores, affinity, cgroup quota, memory and its limit."""
    import psutil

    found = Findings()
    total, allowed = os.cpu_count() or 1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, limit = cgroup_limits()
    memory = psutil.virtual_memory()
    available = min(memory.available, limit) if limit else memory.available
    found.facts = {
        "model": _model(), "logical cores": total, "physical cores": psutil.cpu_count(logical=False), "affinity": allowed,
        "cgroup quota [cores]": quota, "load average": [round(value, 1) for value in os.getloadavg()],
        "memory [GiB]": round(memory.total / GIB, 1), "available [GiB]": round(available / GIB, 1),
        "cgroup memory limit [GiB]": round(limit / GIB, 1) if limit else None, "swap [GiB]": round(psutil.swap_memory().total / GIB, 1),
    }  # fmt: skip
    usable = min(allowed, quota) if quota else allowed
    found.summary = f"{usable:g} of {total} cores usable, {available / GIB:.1f} of {memory.total / GIB:.1f} GiB memory free"
    if quota and quota < allowed:
        found.warn(
            f"the cgroup allows {quota:g} cores, libraries see {allowed} and start as many threads",
            f"set OMP_NUM_THREADS={max(1, int(quota))} (for several processes: divided by their number)",
        )
    if os.getloadavg()[0] > 1.5 * usable:
        found.warn(f"load {os.getloadavg()[0]:.1f} on {usable:g} usable cores: other work is running", "times measured now say little; look with `top`")
    if available < 2 * GIB:
        found.warn(f"{available / GIB:.1f} GiB of memory are free", "end other programs, or raise the container's memory limit")
    return found


def _model() -> str:
    for line in _lines(Path("/proc/cpuinfo")):
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except OSError:
        return []
