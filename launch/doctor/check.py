"""A check and how one is run: in a child process of its own, with a time limit, so that a hang or a crash is a finding and no more."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

LEVELS = ("ok", "warning", "failed")  # from good to bad
REAPING_SECONDS = 5.0  # a killed process that waits for a dead disk does not end; we go on without it


@dataclass(frozen=True)
class Problem:
    """Something found, and what the person can do about it. level: warning or failed."""

    level: str
    found: str
    advice: str


@dataclass
class Findings:
    """What a check gathers: facts by name (JSON), problems, and one line that sums up."""

    summary: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def warn(self, found: str, advice: str) -> None:
        """Training works, but slower, or not everywhere."""
        self.problems.append(Problem("warning", found, advice))

    def fail(self, found: str, advice: str) -> None:
        """Training cannot work like this."""
        self.problems.append(Problem("failed", found, advice))


@dataclass(frozen=True)
class Result:
    """A finished check. seconds: wall time."""

    name: str
    summary: str
    problems: tuple[Problem, ...]
    facts: dict[str, Any]
    seconds: float

    @property
    def status(self) -> str:
        """The worst of its problems: ok, warning or failed."""
        return max((problem.level for problem in self.problems), key=LEVELS.index, default="ok")


@dataclass(frozen=True)
class Settings:
    """What the person asked for. named: the registry was given on the command line, so it must exist."""

    registry: Path
    named: bool = False
    quick: bool = False


@dataclass(frozen=True)
class Check:
    """One check. seconds: after which it counts as hanging; slow: left out by --quick."""

    name: str
    run: Callable[[Settings], Findings]
    seconds: float = 15.0
    slow: bool = False


def run_check(check: Check, settings: Settings) -> Result:
    """Run a check in a forked child. Its exceptions, crashes and hangs become a failed result; nothing of it is left running."""
    started = time.monotonic()
    with _somewhere() as output:
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reader)
            _child(check, settings, writer, output)
        os.close(writer)
        try:
            answer = _read(reader, started + check.seconds)
        finally:
            os.close(reader)
            status = _end(pid)
        seconds = time.monotonic() - started
        if answer:
            told = json.loads(answer)
            problems = tuple(Problem(**problem) for problem in told["problems"])
            return Result(check.name, told["summary"], problems, told["facts"], seconds)
        return Result(check.name, "", (_no_answer(answer, status, check.seconds, output),), {}, seconds)


def _somewhere() -> IO[bytes]:
    """A file for what the check prints; nowhere when no folder for temporary files can be written, which the check of the disks tells."""
    try:
        return tempfile.TemporaryFile()
    except OSError:
        return Path(os.devnull).open("w+b")


def _child(check: Check, settings: Settings, writer: int, output: IO[bytes]) -> None:
    """Run, answer with JSON, leave without the parent's exit handlers. Never returns."""
    code = 1
    try:
        os.setsid()  # so that the check's own children can be ended with it
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
        try:
            found = check.run(settings)
        except Exception as error:
            found = Findings()
            where = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{Path(where.filename).name}:{where.lineno}"
            found.fail(f"the check itself ended with {type(error).__name__}: {error} ({place})", "report this as a bug, with this block")
        told = {"summary": found.summary, "facts": found.facts, "problems": [vars(problem) for problem in found.problems]}
        with os.fdopen(writer, "wb") as pipe:
            pipe.write(json.dumps(told, default=str).encode())
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _read(reader: int, deadline: float) -> bytes | None:
    """Everything up to the end of the pipe; None when it is still open at the deadline."""
    parts: list[bytes] = []
    while (left := deadline - time.monotonic()) > 0:
        if select.select([reader], [], [], left)[0]:
            part = os.read(reader, 1 << 16)
            if not part:
                return b"".join(parts)
            parts.append(part)
    return None


def _end(pid: int) -> int | None:
    """Kill what is left of the check's session and collect its exit status; None when it would not end."""
    deadline = time.monotonic() + REAPING_SECONDS
    status: int | None = None
    while status is None and time.monotonic() < deadline:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
        done, code = os.waitpid(pid, os.WNOHANG)
        if done:
            status = os.waitstatus_to_exitcode(code)
        else:
            time.sleep(0.005)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
    return status


def _no_answer(answer: bytes | None, status: int | None, limit: float, output: IO[bytes]) -> Problem:
    if answer is None:
        return Problem("failed", f"no answer after {limit:.0f} s; the check was ended", "look at what it names: a disk, a driver or a network that hangs")
    output.seek(0)
    lines = output.read().decode("utf-8", "replace").strip().splitlines()
    how = f"signal {-status} ended it" if status is not None and status < 0 else f"it ended with code {status}"
    return Problem("failed", f"the check crashed: {how}{'; its last line: ' + lines[-1] if lines else ''}", "report this as a bug, with this block")
