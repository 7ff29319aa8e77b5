"""Room and speed of the disks that matter, shared memory, and the limits of this process."""

from __future__ import annotations

import os
import resource
import secrets
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from launch.doctor.check import Findings, Settings
from stages.mounts import file_system, is_network

MEMORY = {"tmpfs", "ramfs"}
GIB, MIB = 2**30, 2**20
LITTLE_SHM, NO_SHM = 1 * GIB, 16 * MIB  # containers get 64 MiB unless asked for more
LITTLE_ROOM, NO_ROOM = 10 * GIB, 64 * MIB
SLOW = 50.0  # MB/s: an 8B checkpoint in bf16 (16 GB) would take more than five minutes
WRITTEN = 64 * MIB


def check_shared_memory(_: Settings, folder: Path = Path("/dev/shm")) -> Findings:
    """/dev/shm: data loaders, NCCL and DeepSpeed's collectives between processes of one machine use it."""
    found = Findings()
    if not sys.platform.startswith("linux"):
        found.summary = "not a Linux machine"
        return found
    if not folder.is_dir():
        found.warn(f"there is no {folder}", "data loader workers and NCCL need it on Linux: mount a tmpfs there")
        return found
    usage = os.statvfs(folder)
    size, free = usage.f_blocks * usage.f_frsize, usage.f_bavail * usage.f_frsize
    found.facts = {"size [MiB]": size // MIB, "free [MiB]": free // MIB}
    found.summary = f"{free / GIB:.2f} of {size / GIB:.2f} GiB free"
    remedy = "docker: --shm-size=16g or --ipc=host; Kubernetes: an emptyDir with medium: Memory on /dev/shm"
    if free < NO_SHM:
        left = f"{free // MIB} MiB of {size // MIB} MiB are free"
        found.fail(f"{folder} is full: {left}", f"remove what ended programs left there (ls -l {folder}); {remedy}")
    elif size < LITTLE_SHM:
        found.warn(f"{folder} has {size // MIB} MiB; several GPUs or loader workers need more", remedy)
    if not os.access(folder, os.W_OK):
        found.fail(f"{folder} may not be written", "mount it with mode 1777")
    return found


def check_limits(_: Settings) -> Findings:
    """Limits of open files, processes and locked memory."""
    found = Findings()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    told = {"open files": (soft, hard), "processes": resource.getrlimit(resource.RLIMIT_NPROC), "locked memory": resource.getrlimit(resource.RLIMIT_MEMLOCK)}
    found.facts = {name: " / ".join(_limit(value) for value in pair) for name, pair in told.items()}
    found.summary = f"{_limit(soft)} open files"
    unlimited = resource.RLIM_INFINITY
    higher = f"ulimit -n {min(hard, 65536) if hard != unlimited else 65536}" + ("" if hard == unlimited or hard >= 4096 else " (the hard limit must be raised by an administrator)")
    if soft != unlimited and soft < 256:
        found.fail(f"only {soft} files may be open: sharded checkpoints and several processes need more", higher)
    elif soft != unlimited and soft < 4096:
        found.warn(f"only {soft} files may be open; data loader workers and many ranks can need more", higher)
    locked = told["locked memory"][0]
    if Path("/sys/class/infiniband").is_dir() and locked != unlimited:
        found.warn(f"locked memory is limited to {locked // 1024} KiB and there is InfiniBand", "ulimit -l unlimited (docker: --ulimit memlock=-1), or NCCL falls back to TCP")
    return found


def _limit(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else str(value)


def check_disks(settings: Settings) -> Findings:
    """Where checkpoints and downloads go: file system, free room, may it be written, how fast with fsync."""
    found = Findings()
    cache = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    parts = []
    folders = [("registry", settings.registry, True), ("cache", cache, False)]
    try:
        folders.append(("temporary", Path(tempfile.gettempdir()), False))
    except OSError as error:
        found.fail(f"no folder for temporary files can be written: {error.strerror or error}", "free room in /tmp, or set TMPDIR to a folder that can be written")
    for name, folder, needed in folders:
        facts = _disk(found, name, folder, needed, settings.quick)
        found.facts[name] = facts
        if name != "temporary":
            speed = f", {facts['write [MB/s]']:.0f} MB/s" if "write [MB/s]" in facts else ""
            parts.append(f"{name}: {facts['kind']} {facts['file system']}, {facts['free [GiB]']:.1f} GiB free{speed}")
    found.summary = "; ".join(parts)
    return found


def _disk(found: Findings, name: str, folder: Path, needed: bool, quick: bool) -> dict[str, Any]:
    there = existing(folder)
    usage = os.statvfs(there)
    free = usage.f_bavail * usage.f_frsize
    kind = file_system(there)
    facts: dict[str, Any] = {
        "folder": str(folder), "exists": folder.exists(), "file system": kind, "kind": "network" if is_network(kind) else "memory" if kind in MEMORY else "local",
        "free [GiB]": round(free / GIB, 2), "free inodes": usage.f_favail,
    }  # fmt: skip
    tell = found.fail if needed else found.warn
    if not there.is_dir():
        tell(f"{name}: {there} is a file, a folder is needed", "choose another path")
        return facts
    try:
        _try(facts, there, name == "registry", quick)
    except OSError as error:
        tell(f"{name}: {there} cannot be written: {error.strerror or error}", "check its owner and mount, or choose another folder" + (" with --registry" if needed else " with HF_HOME"))
        return facts
    if needed and kind in MEMORY:
        found.warn(f"{name}: {there} is kept in memory ({kind}): checkpoints take memory from training and are gone after a restart", "put the registry on a disk, with --registry")
    if free < NO_ROOM:
        tell(f"{name}: {free // MIB} MiB are free in {there}", "free some room, or choose another folder")
    elif free < LITTLE_ROOM and name != "temporary":
        found.warn(f"{name}: {free / GIB:.1f} GiB are free in {there}", "an 8B model in bf16 takes 16 GB a checkpoint, its optimizer state 96 GB more")
    if facts.get("write [MB/s]", SLOW) < SLOW:
        found.warn(f"{name}: {there} takes {facts['write [MB/s]']:.0f} MB/s with fsync", "save less often, or put the registry on a faster disk")
    return facts


def _try(facts: dict[str, Any], folder: Path, links: bool, quick: bool) -> None:
    """Write where it counts; the file has no name while it is written, so that nothing is left even when we are killed."""
    file = folder / f".tmp-doctor-{secrets.token_hex(6)}"
    handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        if links:
            facts["hard links"] = _links(file)
    finally:
        file.unlink()
    try:
        size = 4 * MIB if quick else WRITTEN
        if os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize > 2 * size:
            facts |= write_speed(handle, size)
    finally:
        os.close(handle)


def _links(file: Path) -> bool:
    """Whether link(2) works: the registry moves aliases with it."""
    other = file.with_suffix(".link")
    try:
        os.link(file, other)
    except OSError as error:
        if error.errno in (1, 38, 95):  # EPERM, ENOSYS, EOPNOTSUPP: this file system has none
            raise OSError(error.errno, "its file system has no hard links, which the registry needs") from error
        raise
    other.unlink()
    return True


def write_speed(handle: int, size: int) -> dict[str, float]:
    """{"write [MB/s]", "fsync [ms]"}: `size` bytes in 4 MiB pieces up to and including fsync, and the median of five small synced writes."""
    piece = os.urandom(min(size, 4 * MIB))  # random: some file systems do not store zeros
    started = time.monotonic()
    written = 0
    while written < size:
        written += os.write(handle, piece)
    os.fsync(handle)
    speed = written / 1e6 / max(time.monotonic() - started, 1e-9)
    times = []
    for _ in range(5):
        started = time.monotonic()
        os.write(handle, piece[:4096])
        os.fsync(handle)
        times.append((time.monotonic() - started) * 1e3)
    return {"write [MB/s]": round(speed, 1), "fsync [ms]": round(statistics.median(times), 2)}


def existing(folder: Path) -> Path:
    """The folder, or the nearest above it that exists."""
    folder = folder.expanduser().absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder
