"""Runs of two processes of which one stands still in a chosen phase: it sleeps for ever there, or is really stopped (SIGSTOP)."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from configs.exit_codes import HANG
from configs.schema.common import Watchdog
from stages.training import watchdog
from tests.launch import told

# Phase -> a stage that has it. `update` is that of launched.stop_a_rank, `load` has no call that begins it.
STAGES = {"data": "sft", "rollout": "ppo", "scoring": "ppo", "eval": "sft", "save": "ppo", "publish": "sft"}
TRAIN = {"sft": {"max_steps": 6, "eval_every": 2, "save_every": 6}, "ppo": {"iterations": 3, "save_every": 1}}
LIMITS = {"sleeps": 3.0, "is stopped": 6.0}  # seconds


@dataclass(frozen=True)
class Run:
    """A run that has been started: its processes by rank, its config, and where rank 1 stands still, how, and for how many seconds it may."""

    children: list[int]
    values: dict[str, Any]
    phase: str
    how: str
    limit: float

    @property
    def since(self) -> Path:
        """Rank 1 writes there when it began to stand still, in seconds of time.time()."""
        return Path(self.values["registry"]).parent / f"{self.values['name']}.still"


def stand_still(phase: str, how: str, since: Path, rank: int) -> None:
    """Have this process, if it is rank 1, never leave that phase again."""
    enter = watchdog.phase

    def stuck_for_ever(name: str, step: int | None = None) -> None:
        enter(name, step)
        if name != phase:
            return
        if how == "is stopped":
            time.sleep(2)  # until its heartbeat has named the phase
        since.write_text(str(time.time()))
        if how == "is stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(600)

    if rank == 1:
        watchdog.phase = stuck_for_ever


def start(folder: Path, phase: str, how: str) -> Run:
    """Start the run. Where rank 1 sleeps, that phase alone has a limit; where it is stopped, it watches no longer and rank 0 waits in that phase or a later one."""
    limit, stage = LIMITS[how], STAGES[phase]
    limits = {phase: limit / 60} if how == "sleeps" else {name: limit / 60 for name in Watchdog.model_fields if name != "load"}
    values = told.settings(folder, stage, f"{phase}-{how.split()[-1]}", **TRAIN[stage]) | {"watchdog": limits}
    run = Run([], values, phase, how, limit)
    run.children.extend(told.start(stage, values, prepare=partial(stand_still, phase, how, run.since)))
    return run


def problems(run: Run) -> list[str]:
    """What was not as it should be at the end: an exit code of 110 and stacks from each process that can, the phase named, and in time."""
    living = run.children if run.how == "sleeps" else run.children[:1]
    codes = told.ends(living)
    ended = time.time()
    if len(living) == 1:
        os.kill(run.children[1], signal.SIGKILL)  # under a launcher rank 0 would have
        told.ends(run.children[1:])
    place = Path(run.values["registry"]).parent
    log = "".join((place / f"{run.values['name']}.{rank}.log").read_text() for rank in range(2))
    if not run.since.exists():
        return [f"never came into {run.phase}: {codes}: {log[-600:]}"]
    late = ended - float(run.since.read_text()) - run.limit
    stacks = [Path(run.values["output"]) / f"hang-rank-{rank}.txt" for rank in range(len(living))]
    text = "".join(file.read_text() if file.exists() else "" for file in stacks)
    named = f"rank 1 of 2 (process {run.children[1]}) hangs: " in text and f"in phase {run.phase} (limit: watchdog.{run.phase}, " in text and "in stuck_for_ever" in text
    if len(living) == 1:
        named = "rank 1 did not answer" in log and f" in phase {run.phase} at step " in log and "hangs: no progress for " in text
    found = [] if set(codes) == {HANG} else [f"exit codes {codes}"]
    found += [] if late <= 10 else [f"ended {late:.1f} s after its limit"]
    found += [] if all(file.exists() for file in stacks) else ["no stacks of a process"]
    return found + ([] if named else [f"the phase or the process is not named: {log[-600:]}"])
