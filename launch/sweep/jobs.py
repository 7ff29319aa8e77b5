"""The processes of a sweep: one `align run` per trial, its output in a log, told to stop by SIGTERM and ended with us."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.process import die_with_parent, kill_descendants, kill_group

RUN = (sys.executable, "-m", "launch.cli", "run")
GRACE = 300.0  # seconds that a trial which is told to stop gets to save
MEMORY = re.compile(r"out of memory|outofmemory|cannot allocate memory|bad_alloc", re.IGNORECASE)
FULL = re.compile(r"no space left on device|disk quota exceeded|disk is full", re.IGNORECASE)
STEP = re.compile(r"^(?:\[[\w-]+\] )?\S+ (?:\S+ )?(\d+)/(\d+)\b")  # how the stages write it: `sft 40/120  loss …`
NUMBERS = re.compile(r"(?:/[\w.-]+)+|\d[\d.eE+-]*")


@dataclass
class Job:
    """A trial's process (`trial` is None: what all trials share). `told`: seconds since it was told to stop, from the clock of `time.monotonic`."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    place: int
    trial: Any = None
    began: float = field(default_factory=time.monotonic)
    told: float | None = None

    @property
    def seconds(self) -> float:
        """How long it has run."""
        return time.monotonic() - self.began

    def tell(self) -> None:
        """Have it save and leave; `align run` passes the signal on to its stage."""
        if self.told is None:
            self.told = time.monotonic()
            self._send(signal.SIGTERM)

    def hurry(self) -> None:
        """End it if it has been told for longer than the grace."""
        if self.told is not None and time.monotonic() - self.told > GRACE:
            self.kill()

    def kill(self) -> None:
        """End it and all below it at once."""
        kill_descendants(self.process.pid)
        kill_group(self.process.pid)

    def code(self) -> int | None:
        """Its exit code as a shell counts it; None while it runs."""
        code = self.process.poll()
        return code if code is None or code >= 0 else 128 - code

    def _send(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)


def start(name: str, command: Sequence[str], env: Mapping[str, str], log: Path, place: int, trial: Any = None) -> Job:
    """Start a process whose output goes to `log`; it does not outlive us."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as out:
        out.write(f"--- {time.strftime('%Y-%m-%dT%H:%M:%S%z')} {' '.join(command)}\n".encode())
        out.flush()
        process = subprocess.Popen(
            list(command), env={**os.environ, **env}, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
            start_new_session=True, preexec_fn=die_with_parent(signal.SIGKILL),
        )  # fmt: skip
    return Job(name, process, log, place, trial)


def error_in(log: Path, code: int) -> str:
    """Why a process failed: the last error line of its newest run in the log, or the line of its exception; with what its code says where that is all."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").rpartition("\n--- ")[2].splitlines()[1:]
    except OSError:
        lines = []
    told = [line for line in lines if re.match(r"(?:\[[\w-]+\] )?error: ", line)]
    own = [line for line in told if not re.search(r"error: \S+ (?:ended with exit code|was killed by signal)", line)]
    raised = [line for line in lines if re.match(r"(?:\[[\w-]+\] )?[\w.]*(?:Error|Exception|Interrupt)\b", line)]
    memory = [line for line in lines if MEMORY.search(line)]
    line = next((found[-1] for found in (own, memory, raised, told) if found), "")
    line = re.sub(r"^\[[\w-]+\] ", "", line).removeprefix("error: ").strip()
    return line or f"it ended with exit code {code} and said nothing"


def at_its_end(log: Path) -> bool:
    """Whether the stage's newest line says that all its steps are taken: ending it then would save nothing."""
    with log.open("rb") as stream:
        stream.seek(max(0, log.stat().st_size - 20_000))
        found = [match for line in stream.read().decode("utf-8", "replace").splitlines() if (match := STEP.match(line))]
    return bool(found) and found[-1][1] == found[-1][2]


def alike(errors: Sequence[str]) -> bool:
    """Whether errors are the same but for the numbers and paths in them."""
    return len({NUMBERS.sub("#", error) for error in errors}) == 1
