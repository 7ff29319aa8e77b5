"""Resumable saves on a disk that is full or whose bits flip, while real runs train, are killed and go on."""

from __future__ import annotations

import os
import random
import sys
from functools import partial
from pathlib import Path

from stages.training import saves
from tests.launch import test_full_disk
from tests.reliability import runs
from tests.reliability.case import Case, Measured
from tests.unit.registry_samples import flip_bit

FULL = [*test_full_disk.CASES, ("dpo", 2, 0)]
# Each time in the last step, or iteration, with two saves there. The last time both are damaged: the run starts anew.
DEATHS: runs.Deaths = [("step", 8)] * 4
PPO_DEATHS: runs.Deaths = [("scoring", 5), ("scoring", 3), ("scoring", 3), ("scoring", 3)]


def full_disk(folder: Path, seed: int, quick: bool) -> Measured:
    """Each stage on a tmpfs of 3 MiB that is full at two of its saves, has room again, then fails one rank, then reads back otherwise."""
    runs.ready()
    bad = []
    cases = FULL[:1] if quick else FULL
    for stage, world, zero in cases:
        name = f"{stage}, {runs.layout_name(world, zero)}"
        place = folder / name.replace(" ", "-")
        place.mkdir()
        try:
            test_full_disk.check(place, stage, world, zero)
        except AssertionError as error:
            print(f"  {name}: {error}", file=sys.stderr, flush=True)
            bad.append(f"{name}: {str(error)[:300]}")
    detail = (
        f"{'; '.join(f'{stage}, {runs.layout_name(world, zero)}' for stage, world, zero in cases)}. Of 8 saves the 2nd and 3rd find no room, the 5th fails on one process, the 6th reads back "
        "otherwise: one warning each, the save before stays, nothing torn is left, the next one succeeds; metrics and weights are those of a run that nothing happened to"
    )
    return Measured(f"{len(cases) - len(bad)} of {len(cases)}", not bad, "; ".join([detail, *bad]))


def walk_back(folder: Path, seed: int, quick: bool) -> Measured:
    """Each stage on two processes, killed again and again; each time a bit of a drawn byte of the newest save is flipped, the last time one in each save."""
    draw, told, bad, flipped = random.Random(seed), [], [], 0
    stages = ("sft",) if quick else ("sft", "reward", "dpo", "ppo")
    for stage in stages:
        count, place = 0, folder / stage
        place.mkdir()
        deaths = PPO_DEATHS if stage == "ppo" else DEATHS

        def damage(resume: Path, last: int = len(deaths)) -> str:
            nonlocal count
            count += 1
            sound = [save for save in saves.saves(resume) if saves.problem(save) is None]
            assert len(sound) == 2, f"saves that verify: {[save.name for save in sound]}"
            return "; flipped: " + ", ".join(_flip(save, draw) for save in (sound if count == last else sound[:1]))

        run = partial(runs.ppo, 2, 0) if stage == "ppo" else partial(runs.supervised, stage, 2, 0)
        made = run(place, seed, False, deaths=deaths, damage=damage)
        aside = (place / "said.txt").read_text().count("is ignored and put aside as damaged-")
        flipped += len(deaths) + 1
        told.append(f"{stage}: {made.detail}")
        if not made.ok or aside != len(deaths) + 1:
            bad.append(f"{stage}: {made.value}, {aside} saves put aside")
    return Measured(f"{len(stages) - len(bad)} of {len(stages)}", not bad, "; ".join([f"{flipped} flips, each noticed: an older save is taken, or the run starts anew", *bad, *told]))


def _flip(save: Path, draw: random.Random) -> str:
    """Flip a bit of a drawn byte of a drawn file of a save; the file's name."""
    file = draw.choice(sorted(path for path in save.rglob("*") if path.is_file() and path.stat().st_size))
    flip_bit(file, draw.randrange(os.path.getsize(file)))
    return f"{save.name.removeprefix('checkpoint-')}/{file.relative_to(save)}"


CASES = [
    Case("training on a disk that is full, then has room again", "5 of 5 go on, and lose those saves only", full_disk, "real processes, a real file system (tmpfs)"),
    Case("a bit flipped in the newest save, or in every save, of a killed run", "4 of 4 go on from a save that verifies, or anew, equal to the bit", walk_back, "real processes, files on disk"),
]
