"""Limits on chat templates that come with a model or a file: they are programs, and the sandbox bounds what they reach, not how long they take.

A new template is first tried in a forked process with little time and memory, on conversations of several shapes. What it does there is thrown away:
only whether it came to an end counts. Later renderings, whose text may set off what the trial has not, have a limit of processor time.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from configs.errors import UserError

SECONDS = 5.0  # of processor time; a rendering takes about 0.0001
MEMORY = 512 * 2**20  # bytes beyond what the process has
OUT_OF_MEMORY, FINISHED = 3, 0
ADVICE = "take another template (`template: plain`, `chatml` or a .jinja file of yours), and look at who made this one"


class TooLong(Exception):
    """A template has used up its processor time."""


def try_out(name: str, render: Callable[[], Any]) -> None:
    """Call `render` in a forked process that is ended after SECONDS of processor time or MEMORY bytes; what it raises otherwise is left to the real call.

    Raises:
        UserError: it was ended.
    """
    if not sys.platform.startswith("linux"):
        return  # elsewhere a process with threads may not be forked
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads: the child renders text and ends
        child = os.fork()
    if child == 0:
        _in_child(render)
    ended = _wait(child, time.monotonic() + 6 * SECONDS)
    if ended != FINISHED:
        limit = f"{SECONDS:g} s" if ended in (-signal.SIGXCPU, -signal.SIGKILL) else f"{MEMORY // 2**20} MiB"
        raise UserError(f"the template {name!r} takes more than {limit} to render a short conversation; {ADVICE}")


def _in_child(render: Callable[[], Any]) -> None:
    code = FINISHED
    try:
        signal.signal(signal.SIGXCPU, signal.SIG_DFL)
        with open("/proc/self/statm") as facts:
            held = int(facts.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, held + MEMORY))
        resource.setrlimit(resource.RLIMIT_CPU, (int(SECONDS), int(SECONDS) + 1))
        render()
    except MemoryError:
        code = OUT_OF_MEMORY
    except BaseException:
        code = FINISHED  # an error of the template's, which the real call tells
    finally:
        os._exit(code)


def _wait(child: int, until: float) -> int:
    """How the child ended; it is killed at `until`."""
    pause = 0.001
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > until:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return -signal.SIGKILL
        time.sleep(pause)
        pause = min(2 * pause, 0.05)


@contextmanager
def limited(name: str) -> Iterator[None]:
    """Raise UserError in the block once it has used SECONDS of processor time. Signals reach the main thread only; elsewhere there is no limit."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise TooLong

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)  # processor time, so that neither a slow disk nor a test's own alarm is hit
    try:
        yield
    except TooLong:
        raise UserError(f"the template {name!r} takes more than {SECONDS:g} s to render one conversation; {ADVICE}") from None
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
