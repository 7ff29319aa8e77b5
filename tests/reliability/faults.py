"""Faults injected into the registry: kills, power cuts, full disks, flipped bits, many writers at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

from tests.faults import cuts, flips, kills, storage_faults
from tests.faults.scenarios import IMPORT, SCENARIOS, Scenario, light, memory
from tests.reliability.case import Case, Measured

Run = Callable[[Path, int, bool], Measured]
ROOT = Path(__file__).resolve().parents[2]
SHIM = "in-process shim"
REAL = "real processes"


def isolated(run: Run) -> Run:
    """With no git and library look-ups per manifest, and an index of its own."""

    @wraps(run)
    def isolated(folder: Path, seed: int, quick: bool) -> Measured:
        before = os.environ.get("XDG_CACHE_HOME")
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        try:
            with light():
                return run(folder, seed, quick)
        finally:
            os.environ.pop("XDG_CACHE_HOME")
            if before is not None:
                os.environ["XDG_CACHE_HOME"] = before

    return isolated


def counted(bad: list[Any], tried: int, what: str, detail: str) -> Measured:
    """How many of those tried went wrong; none may."""
    first = f" First: {str(bad[0])[:300]}" if bad else ""
    return Measured(f"{len(bad)} of {tried:,} {what}", not bad and tried > 0, detail + first)


@isolated
def kill_everywhere(folder: Path, seed: int, quick: bool) -> Measured:
    bad, tried, left, where = [], 0, 0, []
    for scenario in (*SCENARIOS, IMPORT):
        with memory(folder) as place:
            every = 1 if not quick else 20 if scenario is IMPORT else 5
            found = list(kills.deaths(scenario, place, every))
        tried, left = tried + len(found), left + sum(bool(death.left) for death in found)
        bad += [f"{death.scenario}, killed at {death.call}: {death.problems[0]}" for death in found if death.problems]
        where.append(f"{scenario.name} {len(found)}")
    return counted(bad, tried, "kills did harm", f"kills per operation: {', '.join(where)}; {left} left drafts, all of which gc removed; writes also torn after one byte.")


@isolated
def kill_at_random(folder: Path, seed: int, quick: bool) -> Measured:
    count = 40 if quick else 1000
    with memory(folder) as place:
        made = _module("tests.faults.random_kills", place, count, seed)
    detail = (
        f"a forked process that publishes and moves an alias in turn; SIGKILL a random part of an operation after it is ready or has acknowledged up to 3: {made['publishing']:,} kills in "
        f"a publication, {made['moving']} in a move; the killed processes had acknowledged {made['checkpoints']:,} checkpoints and {made['moves']} moves (fewer than one for every 2 and 10 "
        f"kills would fail this case); {made['unacknowledged']} checkpoints complete but not yet acknowledged, {made['leftovers']} leftovers, which gc removed."
    )
    found = counted(made["problems"], made["kills"], "kills lost or showed something", detail)
    return replace(found, ok=found.ok and made["checkpoints"] >= count // 2 and made["moves"] >= count // 10)


@isolated
def cut_power(folder: Path, seed: int, quick: bool) -> Measured:
    def one(scenario: Scenario) -> cuts.Verdict:
        return cuts.cut_everywhere(scenario, folder, seed, 8 if quick else 64)

    verdict = together(SCENARIOS if quick else (*SCENARIOS, IMPORT), one)
    detail = f"{verdict.points} moments in open, publish, alias, gc and import; of each all disks that the model allows, or a seeded sample where there are more than 64."
    return counted(verdict.problems, verdict.disks, "disks broke a promise", detail)


@isolated
def cut_power_after_kill(folder: Path, seed: int, quick: bool) -> Measured:
    verdict = together(SCENARIOS, lambda scenario: cuts.cut_after_a_kill(scenario, folder, seed, 12, every=9 if quick else 1))
    detail = f"{verdict.points} histories: one process killed before a call, a second publishes or moves an alias, then power fails; up to 12 sampled disks of each."
    return counted(verdict.problems, verdict.disks, "disks broke a promise", detail)


def together(scenarios: Iterable[Scenario], judge: Callable[[Scenario], cuts.Verdict]) -> cuts.Verdict:
    """The verdicts of several scenarios as one, whose problems say where they are from."""
    whole = cuts.Verdict()
    for scenario in scenarios:
        one = judge(scenario)
        whole.points, whole.disks = whole.points + one.points, whole.disks + one.disks
        whole.problems += [f"{scenario.name}: {problem}" for problem in one.problems]
    return whole


@isolated
def delete_each_fsync(folder: Path, seed: int, quick: bool) -> Measured:
    caught = cuts.without_each_fsync(SCENARIOS[1:3] if quick else SCENARIOS, folder, seed, 8 if quick else 24)
    return sites_noticed(caught)


def sites_noticed(caught: dict[str, str | None]) -> Measured:
    """Of the lines that ask for an fsync, how many were noticed when they were deleted."""
    missed = [site for site, problem in caught.items() if problem is None]
    sites = ", ".join(site.split(" < ")[0].removeprefix("registry/") for site in caught)
    told = f" Not noticed: {'; '.join(missed)}." if missed else ""
    return Measured(f"{len(caught) - len(missed)} of {len(caught)} noticed", bool(caught) and not missed, f"lines of the code that ask for an fsync: {sites}.{told}")


@isolated
def fail_storage(folder: Path, seed: int, quick: bool) -> Measured:
    bad, tried, told = [], 0, 0
    for scenario in SCENARIOS if quick else (*SCENARIOS, IMPORT):
        with memory(folder) as place:
            found = list(storage_faults.faults(scenario, place, 7 if quick else 1))
        tried, told = tried + len(found), told + sum(bool(fault.told) for fault in found)
        bad += [f"{fault.what}: {fault.problems[0]}" for fault in found if fault.problems]
    return counted(bad, tried, "faults did harm", f"ENOSPC once and from there on, EIO, short writes, at each call that changes something; {told} were told as a UserError, the others passed without harm.")


@isolated
def write_together(folder: Path, seed: int, quick: bool) -> Measured:
    writers, each = (4, 5) if quick else (16, 40)
    with memory(folder) as place:
        made = _module("tests.faults.crowd", place, writers, each, seed)
    bad = made["publish"] + made["move"]
    detail = f"versions are exactly 1 to {writers * each}, all verify deeply; {writers * each} compare-and-set moves form one chain in the history; {made['refused']} were refused and tried again."
    return counted(bad, 2 * writers * each, "writes lost or doubled", detail)


@isolated
def flip_every_bit(folder: Path, seed: int, quick: bool) -> Measured:
    checkpoint = flips.small(folder / "registry")
    tried, missed = flips.every_bit(checkpoint, 7 if quick else 1)
    size = sum(path.stat().st_size for path in flips.files(checkpoint))
    return counted(missed, tried, "flips missed", f"all 8 bits of every byte of all {len(flips.files(checkpoint))} files, the manifest too, {size:,} bytes.")


@isolated
def flip_in_large(folder: Path, seed: int, quick: bool) -> Measured:
    size, count = (2 * 2**20, 50) if quick else (100 * 2**20, 2000)
    checkpoint = flips.large(folder / "registry", size, seed)
    tried, missed = flips.random_bits(checkpoint, count, seed)
    return counted(missed, tried, "flips missed", f"one bit each in {size / 2**20:.0f} MiB, flipped in place, the whole checkpoint hashed by the deep check, flipped back.")


@isolated
def truncate(folder: Path, seed: int, quick: bool) -> Measured:
    tried, missed = flips.truncations(flips.small(folder / "small"), 10**6, seed)
    more, also = flips.truncations(flips.large(folder / "large", (2 if quick else 100) * 2**20, seed), 20 if quick else 200, seed)
    return counted(missed + also, tried + more, "truncations missed", "every shorter length of every file of a small checkpoint; of a large one 200 lengths per file, one byte less among them.")


def _module(name: str, folder: Path, *words: object) -> dict[str, Any]:
    """What a driver of real processes prints: a process of its own, so that what it forks is small."""
    done = subprocess.run([sys.executable, "-m", name, folder, *map(str, words)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


CASES = [
    Case("registry: SIGKILL at every file system call", "0 kills lose, show or block anything", kill_everywhere, f"{REAL}, killed by an {SHIM}"),
    Case("registry: random kill -9 of a publisher", "0 acknowledged lost of 500 checkpoints and 100 moves or more, 0 invalid visible", kill_at_random, REAL),
    Case("registry: power cut at every call", "0 acknowledged lost, 0 invalid visible", cut_power, f"a model of the disk, fed by an {SHIM}"),
    Case("registry: power cut after a kill", "0 acknowledged lost, 0 invalid visible", cut_power_after_kill, f"a model of the disk, fed by an {SHIM}"),
    Case("registry: each fsync deleted from the code", "all noticed by the power cuts", delete_each_fsync, f"a model of the disk, fed by an {SHIM}"),
    Case("registry: ENOSPC, EIO, short write at every call", "one clear error, nothing changed, the next one works", fail_storage, SHIM),
    Case("registry: 16 writers × 40 checkpoints, 16 × 40 alias moves", "0 lost, versions exactly 1 to 640", write_together, REAL),
    Case("registry: every bit of a small checkpoint flipped", "100 % found by the deep check", flip_every_bit, "files on disk"),
    Case("registry: 2,000 random flips in 100 MiB", "100 % found by the deep check", flip_in_large, "files on disk"),
    Case("registry: truncated files", "100 % found by the quick check", truncate, "files on disk"),
]
