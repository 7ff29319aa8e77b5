"""Runs one child process: output streamed with a prefix and logged, signals passed on, nothing left behind."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO

from configs.exit_codes import HANG, REQUEUE, USER_ERROR

FORWARDED = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name))
USR1 = getattr(signal, "SIGUSR1", None)
PR_SET_PDEATHSIG = 1
# What torch's elastic agent (or Python, on Ctrl-C) writes once a worker has failed: about itself, not about the user's mistake.
AGENT_REPORT = re.compile(rb"^(Traceback \(most recent|[WE]\d{4} \d\d:|\[rank\d+\]|error: )")
WORKER_EXIT = re.compile(rb"exitcode\s*:\s*(\d+)\b")
STOPPED = b"stopped because it was told to ("  # how a stage says that it has saved and left (stages/training/stop.py)
WORKER_DIED = re.compile(rb"failed \(exitcode: -\d+\)")  # the first worker that failed was ended by a signal


@dataclass
class Outcome:
    """How a child ended: its exit code as a shell counts it (128 + signal), wall seconds, whether we were told to stop meanwhile,
    whether a signal ended it or the worker of its that failed first (SIGABRT: libraries that were unloaded in the wrong order), and whether
    what told us was a time limit or a preemption (SIGUSR1, SIGTERM), which says that nothing else is to be begun either."""

    code: int
    seconds: float
    interrupted: bool = False
    died: bool = False
    told: bool = False


@dataclass
class _Stream:
    """Copies a child's output line by line: prefixed to ours, and as it is to the log."""

    prefix: bytes
    log: IO[bytes]
    to_stderr: bool
    on_line: Callable[[str], None] | None = None
    stopping: Callable[[], bool] = lambda: False
    said_error: bool = False
    worker_exits: set[int] = field(default_factory=set)
    worker_died: bool = False
    said_stopped: bool = False
    muted: bool = False
    _broken: bool = field(default=False, repr=False)
    _unlogged: int = field(default=0, repr=False)

    def note(self, line: bytes) -> None:
        """Write a line to the log. On a full disk it is lost and counted: a child whose output nobody reads would stop."""
        try:
            if self._unlogged:
                self.log.write(b"--- %d lines are missing here: they could not be written\n" % self._unlogged)
                self._unlogged = 0
            self.log.write(line + b"\n")
        except OSError as error:
            if not self._unlogged:
                self._show(f"warning: the log can't be written ({error.strerror}); lines of it are lost until there is room".encode())
            self._unlogged += 1

    def copy(self, source: IO[bytes]) -> None:
        for raw in iter(source.readline, b""):
            line = raw.rstrip(b"\r\n").rpartition(b"\r")[2]  # of a progress bar, its last state
            self.note(line)
            self.worker_exits.update(int(code) for code in WORKER_EXIT.findall(line))
            self.worker_died |= bool(WORKER_DIED.search(line))
            self.said_stopped |= STOPPED in line
            self.muted = self.muted or (bool(AGENT_REPORT.match(line)) and (self.said_error or self.said_stopped or self.stopping()))
            self.said_error |= line.startswith(b"error: ")
            if not self.muted or STOPPED in line:  # the agent tells of the signal before the stage has saved
                self._show(line)
            if self.on_line is not None:
                self.on_line(line.decode("utf-8", "replace"))

    def _show(self, line: bytes) -> None:
        # An error is the same line whether the stage was started by hand or from here, so that it can be searched for.
        prefix = b"" if line.startswith(b"error: ") else self.prefix
        out = (sys.stderr if self.to_stderr or self.said_error else sys.stdout).buffer
        try:
            if not self._broken:
                out.write(prefix + line + b"\n")
                out.flush()
        except (BrokenPipeError, ValueError):
            self._broken = True  # keep reading: a child must not block on a pipe because our reader has gone
        except OSError:
            pass  # a full disk: the line is lost, later ones may not be


def die_with_parent(death_signal: int) -> Callable[[], None] | None:
    """A preexec function after which the kernel sends `death_signal` when the parent dies, even of SIGKILL (Linux only)."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None, use_errno=True)
    parent = os.getpid()

    def preexec() -> None:
        libc.prctl(PR_SET_PDEATHSIG, int(death_signal), 0, 0, 0)
        if os.getppid() != parent:  # the parent died between fork and prctl
            os._exit(1)

    return preexec


def run_child(
    argv: Sequence[str],
    env: dict[str, str],
    log_file: Path,
    *,
    prefix: str = "",
    to_stderr: bool = False,
    on_line: Callable[[str], None] | None = None,
    on_start: Callable[[int], None] | None = None,
    grace: float = 300.0,
) -> Outcome:
    """Run `argv` in its own process group until it ends; SIGINT, SIGTERM, SIGHUP and SIGUSR1 that reach us go to the group.

    A second SIGINT, or `grace` seconds after the first of them but SIGUSR1, kills the group; each other signal is passed on once, for a
    child that is saving needs to be told no more. Output is appended to `log_file`.
    Returns the outcome: the child's own exit code, 128 + n where signal n ended it, 130 after SIGINT, and where a worker under `accelerate
    launch` ended with a user error, REQUEUE or HANG, that worker's code. A child that was told to stop, and ended by that or through a launcher
    that has no code for it, is to be run again: REQUEUE. After SIGUSR1, which warns of a time limit, that is so however it ended but well or with an error
    of the user's.
    """
    log_file.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    # Several workers are told by the elastic agent, so the agent must live long enough to do it; one process may go at once.
    death_signal = signal.SIGTERM if "accelerate.commands.launch" in argv else signal.SIGKILL
    with log_file.open("ab", buffering=0) as log, _Signals(grace) as signals:
        stream = _Stream(f"[{prefix}] ".encode() if prefix else b"", log, to_stderr, on_line, lambda: bool(signals.received))
        stream.note(f"--- {time.strftime('%Y-%m-%dT%H:%M:%S%z')} {' '.join(argv)}".encode())
        child = subprocess.Popen(
            list(argv), env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True, preexec_fn=die_with_parent(death_signal),
        )  # fmt: skip
        signals.attach(child.pid)
        if on_start is not None:
            on_start(child.pid)
        assert child.stdout is not None
        reader = threading.Thread(target=stream.copy, args=(child.stdout,), daemon=True)
        reader.start()
        code = child.wait()
        kill_group(child.pid)  # a worker that outlived its leader would hold the pipe, the port and the memory
        reader.join(timeout=10)
        code = code if code >= 0 else 128 - code
    code = code_of(code, stream, signals.received)
    interrupted = any(number != USR1 for number in signals.received)
    died = code > 128 or (code == 1 and stream.worker_died and not stream.said_error)
    told = any(number in (signal.SIGTERM, USR1) for number in signals.received)
    return Outcome(code, time.monotonic() - started, interrupted, died, told)


def code_of(code: int, stream: _Stream, received: Sequence[int]) -> int:
    """What a child's exit code means, with what it printed and the signals that were passed on to it: see `run_child`."""
    if signal.SIGINT in received:
        return 128 + signal.SIGINT
    if code == 1 and stream.said_error and USER_ERROR in stream.worker_exits:
        return USER_ERROR
    if code == 1 and HANG in stream.worker_exits:
        return HANG
    asked = REQUEUE in stream.worker_exits or stream.said_stopped
    if code == 1 and (asked or signal.SIGTERM in received):  # the elastic agent's own way to end, after a worker's code or a signal to itself
        return REQUEUE
    if (code == 128 + signal.SIGTERM and signal.SIGTERM in received) or (code not in (0, USER_ERROR) and USR1 in received):
        return REQUEUE
    return code


@contextlib.contextmanager
def leaving_when_told() -> Iterator[None]:
    """While no child runs, SIGTERM and SIGUSR1 end this process with REQUEUE, as they end a child; to be entered in the main thread."""

    def leave(*_: object) -> None:
        raise SystemExit(REQUEUE)

    numbers = [number for number in (signal.SIGTERM, USR1) if number is not None]
    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, leave) for number in numbers} if main else {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def kill_running() -> None:
    """SIGKILL the children that run: those that were told to stop and wait for processes that are gone."""
    for signals in list(_running):
        signals.kill()


def kill_group(group: int) -> None:
    """SIGKILL whatever is left of a process group."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


class _Signals:
    """While entered, passes signals on to a child's process group and restores our own handlers afterwards."""

    def __init__(self, grace: float) -> None:
        self.grace = grace
        self.received: list[int] = []
        self._group: int | None = None
        self._old: dict[int, object] = {}
        self._timer: threading.Timer | None = None

    def __enter__(self) -> _Signals:
        _running.append(self)
        if threading.current_thread() is threading.main_thread():
            self._old = {number: signal.signal(number, self._forward) for number in FORWARDED}
        return self

    def __exit__(self, *_: object) -> None:
        _running.remove(self)
        if self._timer is not None:
            self._timer.cancel()
        for number, handler in self._old.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def attach(self, group: int) -> None:
        self._group = group
        for number in self.received:  # arrived while the child was being started
            self._send(number)

    def _forward(self, number: int, _frame: FrameType | None) -> None:
        again = number in self.received
        self.received.append(number)
        if not again:
            self._send(number)
        elif number == signal.SIGINT:
            self.kill()
        if self._timer is None and number != USR1:
            self._timer = threading.Timer(self.grace, self.kill)
            self._timer.daemon = True
            self._timer.start()

    def kill(self) -> None:
        """End the child and all below it."""
        self._send(signal.SIGKILL)

    def _send(self, number: int) -> None:
        if self._group is None:
            return
        if number == signal.SIGKILL:
            kill_descendants(self._group)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._group, number)


_running: list[_Signals] = []


def kill_descendants(pid: int) -> None:
    """SIGKILL every process below `pid`: the elastic agent starts its workers in sessions of their own."""
    import psutil

    try:
        for process in psutil.Process(pid).children(recursive=True):
            process.kill()
    except psutil.Error:
        pass
