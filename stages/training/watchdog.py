"""Ends a run that hangs: stacks of all processes on disk, one line that says who did not come, and an exit code of its own.

Each process has a thread that looks once a second whether the phase it is in has moved: `beat()` after every micro-batch, token and batch,
and bytes read or written while models are loaded or saved. What it finds goes to OUTPUT/heartbeats/rank-N.json, so that a process which waits
in a collective sees that another one is slow, not stuck. No collective is used, and the training thread only sets a number.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from configs.exit_codes import HANG
from stages.training.exit_later import cancel, exit_later

PHASES_THAT_MOVE_BYTES = ("load", "data", "save", "publish")
MOVED = 1 << 20  # bytes in a look: fewer are logs
BUSY = 300.0  # seconds that a filesystem under load may take for a heartbeat
FOLDER = "heartbeats"
WANTED = "stacks-wanted"  # beside them: a process has found that the run hangs
_running: list[Watch] = []  # of this process: one, or none


class Now:
    """What this process does: its phase, how far it is, and when it last moved (seconds of time.monotonic)."""

    def __init__(self) -> None:
        self.phase, self.step = "load", 0
        self.beaten = self.began = time.monotonic()


_now = Now()


def beat(step: int | None = None) -> None:
    """The phase has moved. Costs less than a microsecond."""
    _now.beaten = time.monotonic()
    if step is not None:
        _now.step = step


def phase(name: str, step: int | None = None) -> None:
    """A phase begins: load, data, rollout, scoring, update, eval, save or publish. `step`: the optimizer step or iteration it is of."""
    _now.phase = name
    beat(step)
    _now.began = _now.beaten


@contextlib.contextmanager
def during(name: str) -> Iterator[None]:
    """A phase within another one."""
    before = _now.phase
    phase(name)
    try:
        yield
    finally:
        phase(before)


def beating(measure: Callable[..., Any]) -> Any:
    """An evaluation's measure that beats for every batch."""

    def measured(*arguments: Any, **keywords: Any) -> Any:
        if _now.phase != "eval":
            phase("eval")
        beat()
        return measure(*arguments, **keywords)

    return measured


def start(cfg: Any, output: Path) -> None:
    """Watch this process from now on, with the limits of `cfg.watchdog` (minutes); files go to `output`. Once a process."""
    from stages.training.ranks import rank, world_size

    if not hasattr(cfg, "watchdog"):  # an evaluation's config has none
        return
    limits = {name: minutes * 60 if minutes else math.inf for name, minutes in cfg.watchdog.model_dump().items()}
    if all(map(math.isinf, limits.values())):
        return
    try:
        watch = Watch(limits, output, rank(), world_size())
    except OSError:  # a working folder that can't be written is told by the stage
        return
    _running.append(watch)
    watch.thread.start()


def end() -> None:
    """Watch no longer: this process is ending by itself. What it had written for the other processes goes."""
    while _running:
        _running.pop().end()


class Watch:
    """The watchdog of this process: `rank` of `world`; `limits` are seconds by phase."""

    def __init__(self, limits: dict[str, float], output: Path, rank: int, world: int, now: Now = _now) -> None:
        self.limits, self.output, self.rank, self.world, self.now = limits, output, rank, world, now
        self.folder = output / FOLDER
        self.every = min(max(1.0, world / 100), *(limit / 5 for limit in limits.values()))  # many processes share one filesystem
        self.answer = max(3.0, self.every + 2)  # seconds that the other processes get to write their stacks
        self.folder.mkdir(parents=True, exist_ok=True)
        self.moved = bytes_moved()
        self.write_heartbeat()
        self.started = self.heartbeat(rank).stat().st_mtime  # as the filesystem's own clock has it, which all nodes share
        self.keep_earlier_stacks()
        self.stacks: TextIO = (self.folder / f"rank-{rank}.stacks").open("w")
        faulthandler.register(signal.SIGUSR2, self.stacks, all_threads=True)  # for another process of this machine to ask for
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.run, daemon=True, name="watchdog")

    def keep_earlier_stacks(self) -> None:
        """What a run before this one, which a timer ended, has left goes to OUTPUT/hang-rank-N.txt: a cluster may have started this one at once."""
        earlier, kept = self.folder / f"rank-{self.rank}.stacks", self.output / f"hang-rank-{self.rank}.txt"
        with contextlib.suppress(OSError):
            text, times = earlier.read_text(), earlier.stat()
            if text:
                with kept.open("a") as stream:
                    stream.write(f"\nended by the watchdog's timer:\n{text}")
                os.utime(kept, ns=(times.st_atime_ns, times.st_mtime_ns))  # it is not of this run

    def run(self) -> None:
        """Look again and again, until the end."""
        looked = time.monotonic()
        while not self.ended.wait(self.every):
            gap, looked = time.monotonic() - looked, time.monotonic()
            with contextlib.suppress(OSError):  # a full disk does not end the watch
                self.look(gap)

    def end(self) -> None:
        """Look no more, and remove this process's files; the folder goes with the last of them."""
        self.ended.set()
        self.thread.join(self.every + 1)
        faulthandler.cancel_dump_traceback_later()
        cancel()
        faulthandler.unregister(signal.SIGUSR2)
        self.stacks.close()
        with contextlib.suppress(OSError):
            Path(self.stacks.name).unlink()
            self.heartbeat(self.rank).unlink()
            self.folder.rmdir()

    def look(self, gap: float) -> None:
        """Once, `gap` seconds after the last time; does not return where the run hangs."""
        now = self.now
        moved, self.moved = bytes_moved() - self.moved, bytes_moved()
        if gap > self.every + 10:  # the whole process was stopped, as a suspended job's is
            now.beaten = min(now.beaten + gap, time.monotonic())
        elif moved >= MOVED and now.phase in PHASES_THAT_MOVE_BYTES:
            now.beaten = time.monotonic()
        left = self.limits[now.phase] - (time.monotonic() - now.beaten)
        if math.isfinite(left):  # this thread may never run again: a library may keep the interpreter's lock
            # Not sooner than in some minutes: past its limit, while another process still moves, a filesystem that is busy with a save holds up the lines below.
            soonest = max(self.every, min(self.limits[now.phase], BUSY))
            seconds = max(left, soonest) + 2 * self.answer
            ends = exit_later(seconds + 1, HANG)
            faulthandler.dump_traceback_later(seconds, exit=not ends, file=self.stacks)
        self.write_heartbeat()
        wanted = self.wanted()
        if not wanted and left <= 0:
            wanted = self.others_are_still(self.limits[now.phase])
        if wanted:
            from stages.training.hang import end

            end(self)

    def wanted(self) -> bool:
        """Whether another process has found that the run hangs."""
        try:
            return (self.folder / WANTED).stat().st_mtime >= self.started
        except OSError:
            return False

    def others_are_still(self, limit: float) -> bool:
        """Whether no other process has moved for `limit` seconds: one that is slow keeps all waiting, and that is no hang."""
        last = (self.read_heartbeat(other).get("beaten", 0.0) for other in range(self.world) if other != self.rank)
        return max(last, default=0.0) <= time.time() - limit

    def heartbeat(self, rank: int) -> Path:
        """The file of a process."""
        return self.folder / f"rank-{rank}.json"

    def write_heartbeat(self) -> None:
        """What this process does, for the others and for whoever looks."""
        now, clock = self.now, time.time() - time.monotonic()
        self.heartbeat(self.rank).write_text(json.dumps({
            "rank": self.rank, "host": socket.gethostname(), "pid": os.getpid(), "phase": now.phase, "step": now.step,
            "began": now.began + clock, "beaten": now.beaten + clock,
        }))  # fmt: skip

    def read_heartbeat(self, rank: int) -> dict[str, Any]:
        """What a process last said; empty where it has not, or is writing just now."""
        try:
            return dict(json.loads(self.heartbeat(rank).read_text()))
        except (OSError, ValueError):
            return {}


def bytes_moved() -> int:
    """Bytes that this process has read and written, 0 where that can't be told; memory-mapped files are not in it."""
    try:
        lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
        faults = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[9]  # major ones: pages of mapped files that were read
        return int(lines["rchar"]) + int(lines["wchar"]) + int(faults) * 4096
    except (OSError, ValueError, KeyError, IndexError):
        return 0
