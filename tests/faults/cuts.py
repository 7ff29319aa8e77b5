"""Power cuts at every call of a scenario, by the model of `power`; also with each fsync deleted in turn, and after a kill."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

from tests.faults.kills import calls
from tests.faults.power import Point, Recorder, build, outcomes
from tests.faults.promises import Promises, broken
from tests.faults.scenarios import Scenario, as_new_process, go_on, memory
from tests.faults.shim import Call, watching

Act = Callable[[Path, Promises, Callable[[], None]], None]


@dataclass
class Verdict:
    """How many disks were looked at, and what did not hold on the first bad ones."""

    points: int = 0
    disks: int = 0
    problems: list[str] = field(default_factory=list)


class Died(BaseException):
    """Stands for a SIGKILL within the process that is recorded: no call after it has an effect."""


class _Mortal(Recorder):
    """A recorder whose program dies before its `at`-th call."""

    at: int | None = None

    def before(self, index: int, call: Call) -> int | None:
        if self.at is not None and index >= self.at:
            raise Died
        return None


def record(scenario: Scenario, folder: Path, skip: str | None = None, die_at: int | None = None, after: Act | None = None) -> tuple[list[Point], list[str]]:
    """The points of a scenario, one after each call and each acknowledgement; with `die_at` those of `after`, when the scenario died before that call."""
    promises, root = Promises(), folder / "registry"
    folder.mkdir()
    scenario.prepare(root, promises)
    as_new_process()
    recorder = _Mortal(folder, promises, skip)
    if die_at is not None:
        recorder.at = die_at
        try:
            with watching(folder, recorder):
                scenario.act(root, promises, recorder.acknowledged)
        except Died:
            pass
        recorder.at, recorder.points = None, []
        as_new_process()
    with watching(folder, recorder):
        (after or scenario.act)(root, promises, recorder.acknowledged)
    shutil.rmtree(folder)
    return recorder.points, recorder.syncs


@contextmanager
def in_memory(fallback: Path) -> Iterator[Path]:
    """Where programs are recorded and disks are built to be looked at, with fsync doing nothing."""
    with memory(fallback) as made, mock.patch("os.fsync", return_value=None):
        yield made


def look(points: Sequence[Point], place: Path, chance: random.Random, most: int, *, on: bool = False, stop: bool = False, verdict: Verdict | None = None) -> Verdict:
    """Check what each point may leave, the last point first. on: the next operations must work too. stop: at the first problem."""
    verdict = verdict or Verdict()
    known: dict[str, set[bytes]] = {}
    for point in reversed(points):
        verdict.points += 1
        seen = known.setdefault(repr(point.promises), set())
        for outcome in outcomes(point.disk, most, chance):
            if not build(point.disk, outcome, place, seen):
                continue
            verdict.disks += 1
            root = place / "registry"
            problems = broken(root, point.promises) or (go_on(root, point.promises) if on else [])
            if problems:
                verdict.problems.append(f"{point.call}: {problems[0]}")
                if stop or len(verdict.problems) > 20:
                    return verdict
    return verdict


def cut_everywhere(scenario: Scenario, folder: Path, seed: int, most: int) -> Verdict:
    """Power fails after each call; every disk that it may leave keeps what was acknowledged, and goes on."""
    with in_memory(folder) as folder:
        points, _ = record(scenario, folder / "recorded")
        return look(points, folder / "disk", random.Random(seed), most, on=True)


def without_each_fsync(scenarios: Sequence[Scenario], folder: Path, seed: int, most: int) -> dict[str, str | None]:
    """Line that asks for an fsync -> the problem that the model finds when this one is deleted, None when it finds none.

    First power fails within a scenario; lines that this does not tell apart (an fsync of what another process may have left
    unsynced) are then deleted while power fails after a kill and what a second process did.
    """
    caught: dict[str, str | None] = {}
    with in_memory(folder) as folder:
        place = folder / "disk"
        for scenario in scenarios:
            for site in dict.fromkeys(record(scenario, folder / "recorded")[1]):
                if not caught.get(site):
                    points, _ = record(scenario, folder / "recorded", skip=site)
                    caught[site] = _first(look(points, place, random.Random(seed), most, on=True, stop=True))
        for scenario in scenarios:
            for at, after in seconds(scenario, folder, only="fsync"):
                sites = record(scenario, folder / "recorded", die_at=at, after=after)[1]
                for site in dict.fromkeys(sites):
                    if not caught.get(site):
                        points, _ = record(scenario, folder / "recorded", skip=site, die_at=at, after=after)
                        caught[site] = _first(look(points[-1:], place, random.Random(seed), most, stop=True))
    return caught


def _first(verdict: Verdict) -> str | None:
    return verdict.problems[0] if verdict.problems else None


def seconds(scenario: Scenario, folder: Path, only: str | None = None, every: int = 1) -> Iterator[tuple[int, Act]]:
    """Where a first process is killed (before calls that change something, or only those of one name), and what a second does."""
    seen = calls(scenario, folder / "counted")
    shutil.rmtree(folder / "counted")
    places = [at for at, call in enumerate(seen, 1) if (call.name == only if only else call.name != "read")]
    for at in places[::every]:
        for after in scenario.after:
            yield at, after


def cut_after_a_kill(scenario: Scenario, folder: Path, seed: int, most: int, every: int = 1) -> Verdict:
    """A first process is killed before its k-th call, a second does what it may, then power fails: for every k."""
    verdict, chance = Verdict(), random.Random(seed)
    with in_memory(folder) as folder:
        place = folder / "disk"
        for at, after in seconds(scenario, folder, every=every):
            points, _ = record(scenario, folder / "recorded", die_at=at, after=after)
            look(points[-1:], place, chance, most, verdict=verdict)
    return verdict
