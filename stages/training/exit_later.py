"""Ends this process with an exit code of choice after a time, whatever its threads do: also where a library keeps the interpreter's lock.

Python's own timer for that (faulthandler) ends a process with 1, which a cluster does not start again. The C library's timer calls a C function in a
thread of its own, here `_exit` with the code: timer_create(2) with SIGEV_THREAD, on 64-bit Linux.
"""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Any

SIGEV_THREAD, CLOCK_MONOTONIC = 2, 1  # <bits/sigevent-consts.h>, <bits/time.h>
_timers: dict[tuple[int, int], ctypes.c_void_p] = {}  # by process, since a fork has none of them, and exit code


class _Event(ctypes.Structure):
    """struct sigevent, <bits/types/sigevent_t.h>: 64 bytes."""

    _fields_ = (
        ("value", ctypes.c_void_p), ("signo", ctypes.c_int), ("notify", ctypes.c_int), ("function", ctypes.c_void_p), ("attributes", ctypes.c_void_p),
        ("rest", ctypes.c_char * 32),
    )  # fmt: skip


class _When(ctypes.Structure):
    """struct itimerspec: again every so often (never), and first after so long."""

    _fields_ = (("every", ctypes.c_long * 2), ("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


def exit_later(seconds: float, code: int) -> bool:
    """End this process with `code` in so many seconds, unless this is called again, with another time, or `cancel` is. False where this system has no such timer."""
    try:
        library = _library()
        timer = _timers.get((os.getpid(), code)) or _made(library, code)
        _timers[os.getpid(), code] = timer
        return _set(library, timer, max(seconds, 0.001))
    except (OSError, AttributeError):
        return False


def cancel() -> None:
    """Forget what was asked of `exit_later`."""
    for (process, _), timer in _timers.items():
        if process == os.getpid():
            _set(_library(), timer, 0.0)


def _library() -> Any:
    if not sys.platform.startswith("linux") or ctypes.sizeof(ctypes.c_void_p) != 8:
        raise OSError("another system")
    library = ctypes.CDLL(None)
    return library if hasattr(library, "timer_create") else ctypes.CDLL("librt.so.1")  # glibc before 2.34


def _made(library: Any, code: int) -> ctypes.c_void_p:
    ends = ctypes.cast(ctypes.CDLL(None)._exit, ctypes.c_void_p).value
    event, timer = _Event(value=code, notify=SIGEV_THREAD, function=ends), ctypes.c_void_p()
    if library.timer_create(CLOCK_MONOTONIC, ctypes.byref(event), ctypes.byref(timer)):
        raise OSError("no timer")
    return timer


def _set(library: Any, timer: ctypes.c_void_p, seconds: float) -> bool:
    when = _When(seconds=int(seconds), nanoseconds=int(seconds % 1 * 1e9))
    return library.timer_settime(timer, 0, ctypes.byref(when), None) == 0
