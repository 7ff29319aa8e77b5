"""Operators that torch compiles for DeepSpeed, and the locks that a killed build leaves.

torch guards a build by a file called `lock`, which it creates and keeps open until the build is done, and waits for without an end. A process
that is killed meanwhile leaves the file: every later run of this user on this machine would wait for ever in its first collective call.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from stages.mounts import on_network
from stages.processes import PROC

FOLDER = "TORCH_EXTENSIONS_DIR"
LOCK = "lock"
ELSEWHERE = 1800.0  # seconds: a home directory may be shared, and what a process of another machine has open can't be seen from here


def folder() -> Path:
    """Where torch builds: TORCH_EXTENSIONS_DIR, or torch_extensions in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(os.environ.get(FOLDER) or Path(cache) / "torch_extensions")


def remove_abandoned_locks(now: float | None = None) -> list[Path]:
    """Remove the locks of builds that nobody is at work on, and return them; for one process of each machine to call, before DeepSpeed starts.

    A lock that no process here has open is abandoned; on a network file system, or where /proc tells nothing, once it is half an hour old.
    """
    removed = []
    for lock in [*folder().glob(f"*/{LOCK}"), *folder().glob(f"*/*/{LOCK}")]:
        with suppress(OSError):  # it was released just now, or is not ours to remove
            seen = lock.stat()
            held = (seen.st_dev, seen.st_ino) in set(open_files())
            old = (time.time() if now is None else now) - seen.st_mtime > ELSEWHERE
            if not held and (old or (PROC.is_dir() and not on_network(lock))):
                lock.unlink()
                removed.append(lock)
    return removed


def open_files() -> Iterator[tuple[int, int]]:
    """(device, inode) of every file that a process of this user and machine has open."""
    for process in PROC.glob("[0-9]*"):
        with suppress(OSError):  # it has ended, or is another user's
            for link in (process / "fd").iterdir():
                with suppress(OSError):
                    status = link.stat()
                    yield status.st_dev, status.st_ino
