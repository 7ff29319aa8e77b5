"""Faults injected into the saves of a run, and into the resumable states that are kept of published ones: power cuts, kills."""

from __future__ import annotations

from pathlib import Path

from tests.faults import cuts, kills
from tests.faults.scenarios import SAVES, STATES, memory
from tests.reliability.case import Case, Measured
from tests.reliability.faults import REAL, SHIM, counted, isolated, sites_noticed, together


@isolated
def cut_power(folder: Path, seed: int, quick: bool) -> Measured:
    verdict = together((SAVES, STATES), lambda scenario: cuts.cut_everywhere(scenario, folder, seed, 8 if quick else 64))
    detail = (
        f"{verdict.points} moments in making saves of three steps, one of them twice, and in keeping one beside a checkpoint and writing it out again; of each all disks "
        "that the model allows, or a seeded sample where there are more than 64. The newest acknowledged save and one to fall back to must be sound, the next start and save work."
    )
    return counted(verdict.problems, verdict.disks, "disks broke a promise", detail)


@isolated
def cut_power_after_kill(folder: Path, seed: int, quick: bool) -> Measured:
    verdict = together((SAVES,), lambda scenario: cuts.cut_after_a_kill(scenario, folder, seed, 12, every=9 if quick else 1))
    detail = f"{verdict.points} histories: a run killed before a call, a second that resumes and saves, then power fails; up to 12 sampled disks of each."
    return counted(verdict.problems, verdict.disks, "disks broke a promise", detail)


@isolated
def delete_each_fsync(folder: Path, seed: int, quick: bool) -> Measured:
    return sites_noticed(cuts.without_each_fsync((SAVES,) if quick else (SAVES, STATES), folder, seed, 8 if quick else 24))


@isolated
def kill_everywhere(folder: Path, seed: int, quick: bool) -> Measured:
    bad, tried, left, where = [], 0, 0, []
    for scenario in (SAVES, STATES):
        with memory(folder) as place:
            found = list(kills.deaths(scenario, place, 17 if quick else 1))
        tried, left = tried + len(found), left + sum(bool(death.left) for death in found)
        bad += [f"{death.scenario}, killed at {death.call}: {death.problems[0]}" for death in found if death.problems]
        where.append(f"{scenario.name} {len(found)}")
    return counted(bad, tried, "kills did harm", f"kills per operation: {', '.join(where)}; writes also torn after one byte; {left} left drafts in the registry, all of which gc removed.")


CASES = [
    Case("saves: power cut at every call", "0 acknowledged lost", cut_power, f"a model of the disk, fed by an {SHIM}"),
    Case("saves: power cut after a kill", "0 acknowledged lost", cut_power_after_kill, f"a model of the disk, fed by an {SHIM}"),
    Case("saves: each fsync deleted from the code", "all noticed by the power cuts", delete_each_fsync, f"a model of the disk, fed by an {SHIM}"),
    Case("saves: SIGKILL at every file system call", "0 kills lose or block anything", kill_everywhere, f"{REAL}, killed by an {SHIM}"),
]
