"""What a person sees while a chain runs: a header per step, time used, and time left where it is known."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from launch.chain.decide import Decision

EVERY = 30.0  # seconds between lines about time left
STEP_OF = re.compile(r"^\S+ (?:\S+ )?(\d+)/(\d+)\b")  # how the stages write it: `sft 40/120  loss …`


def duration(seconds: float) -> str:
    """A time as 0:42, 12:05 or 2:03:10."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Progress:
    """Prints to `out` and keeps every step's last duration in `file`, from which the next run estimates."""

    def __init__(self, file: Path, plan: list[Decision], out: TextIO) -> None:
        self.file, self.out = file, out
        self.names = [decision.step.name for decision in plan]
        self.will_run = {decision.step.name for decision in plan if decision.action != "skip"}
        self.known: dict[str, dict[str, Any]] = _read(file)
        self._rows: list[dict[str, Any]] = []
        self._began = self._step_began = self._told = time.monotonic()
        self._current = -1
        self._share: float | None = None

    def say(self, line: str) -> None:
        """Print a line; a reader that has gone does not stop the chain."""
        try:
            print(line, file=self.out, flush=True)
        except BrokenPipeError:
            self.out = open(os.devnull, "w")  # noqa: SIM115 - lives as long as we do

    def header(self, number: int, decision: Decision) -> None:
        """`[2/6] reward: run (not published yet)` and what is known of the time."""
        self._current, self._share = number, None
        self._step_began = self._told = time.monotonic()
        name = decision.step.name
        (self.will_run.discard if decision.action == "skip" else self.will_run.add)(name)
        self._rows.append({"step": name, "action": decision.action, "why": decision.why, "seconds": 0.0, "checkpoint": decision.ref})
        left = self.left() if decision.action != "skip" else None
        self.say(f"[{number + 1}/{len(self.names)}] {name}: {decision.action} ({decision.why}){_about(left)}")

    def line(self, text: str) -> None:
        """One line of the step's output: learn its progress from it, and now and then say how much time is left."""
        found = STEP_OF.match(text)
        if found and 0 < int(found[1]) <= int(found[2]):
            self._share = int(found[1]) / int(found[2])
        now = time.monotonic()
        if now - self._told >= EVERY:
            self._told = now
            where = f"[{self._current + 1}/{len(self.names)}] {self.names[self._current]}"
            self.say(f"{where}: {duration(now - self._step_began)} of {duration(now - self._began)} in all{_about(self.left())}")

    def left(self) -> float | None:
        """Seconds until the chain is done, from this step's own progress and the last durations; None where one is unknown."""
        if self._current < 0:
            return None
        used = time.monotonic() - self._step_began
        current = self.names[self._current]
        whole = self.known.get(current, {}).get("seconds")
        if self._share is not None and self._share > 0.05:
            whole = used / self._share
        later = [self.known.get(name, {}).get("seconds") for name in self.names[self._current + 1 :] if name in self.will_run]
        if whole is None or None in later:
            return None
        return max(0.0, whole - used) + sum(seconds for seconds in later if seconds is not None)

    def finished(self, name: str, seconds: float, ref: str | None) -> None:
        """A step has run: keep how long it took."""
        self._rows[-1].update(seconds=round(seconds, 1), checkpoint=ref)
        self.known[name] = {"seconds": round(seconds, 1), "checkpoint": ref}
        part = self.file.with_suffix(".tmp")
        part.write_text(json.dumps({"steps": self.known}, indent=1), encoding="utf-8")
        os.replace(part, self.file)
        self.say(f"[{self._current + 1}/{len(self.names)}] {name}: done in {duration(seconds)}" + (f", published {ref}" if ref else ""))

    def total_seconds(self) -> float:
        """Seconds that the steps of this chain took when they last ran."""
        return sum(self.known.get(name, {}).get("seconds", 0.0) for name in self.names)

    def rows(self) -> list[dict[str, Any]]:
        """What every step did in this run."""
        return self._rows


def _about(seconds: float | None) -> str:
    return "" if seconds is None else f" · about {duration(seconds)} left"


def _read(file: Path) -> dict[str, dict[str, Any]]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8"))["steps"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}
