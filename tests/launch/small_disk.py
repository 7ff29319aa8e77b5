"""A real small file system for a test: a tmpfs that only the processes of the test see, mounted in namespaces of their own."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from pathlib import Path

from tests.forked import forked

CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000  # <linux/sched.h>
MS_REC, MS_PRIVATE = 0x4000, 0x40000  # <linux/mount.h>
FILLER = "filler"


def in_small_disk(folder: Path, size: int, work: Callable[[], int]) -> int:
    """Call `work` in a new process for which `folder` is a tmpfs of `size` bytes; its result, 0 … 255. 254: no such file system is allowed here.

    What is on the tmpfs ends with the process: `work` looks at it itself.
    """
    def on_it() -> int:
        try:
            mount(folder, size)
        except OSError as error:
            print(f"no tmpfs: {error}", file=sys.stderr)
            return 254
        return work()

    return os.waitstatus_to_exitcode(os.waitpid(forked(on_it, failed=253), 0)[1])


def mount(folder: Path, size: int) -> None:
    """Put a tmpfs over a folder, for this process and those that it starts. Raises OSError where the kernel does not allow it."""
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    _call(libc.unshare(CLONE_NEWUSER | CLONE_NEWNS))
    for file, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
        Path(f"/proc/self/{file}").write_text(text)
    _call(libc.mount(b"none", b"/", None, ctypes.c_ulong(MS_REC | MS_PRIVATE), None))
    _call(libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", ctypes.c_ulong(0), f"size={size}".encode()))


def _call(result: int) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def fill(folder: Path, leave: int) -> None:
    """Write a file that leaves `leave` bytes free."""
    make_room(folder)
    status = os.statvfs(folder)
    free = status.f_bavail * status.f_frsize
    with (folder / FILLER).open("wb") as stream:
        stream.write(b"x" * max(0, free - leave))


def make_room(folder: Path) -> None:
    """Remove it."""
    (folder / FILLER).unlink(missing_ok=True)
