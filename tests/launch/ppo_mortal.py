"""PPO runs in processes that die at a chosen point as if the kernel had killed them.

Processes are forked from the test's own, which has everything imported, so that a run of a second does not wait ten for its start;
that a real `accelerate launch` works is shown by test_ppo_two_processes.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from stages.training import saves
from stages.zero.leave import leave
from tests.forked import become_rank, forked, free_port
from tests.launch.zero_mortal import at_call, environment
from tests.stage import ppo_runs


def arm(point: str, number: int) -> None:
    """Set where this process dies: in scoring a rollout, before an optimizer step, before a save is sealed, or when it is renamed."""
    if point == "scoring":
        ppo_runs.calls = 0
        os.environ["PPO_TEST_DIES_AT"] = f"kill:{number}"
    elif point == "step":
        torch.optim.AdamW.step = at_call(number, torch.optim.AdamW.step)  # type: ignore[method-assign]
    elif point == "seal":
        saves.seal = at_call(number, saves.seal)
    else:
        assert point == "renamed", point
        saves.differs = at_call(number, saves.differs)


def run_in_processes(values: dict[str, Any], world: int, death: tuple[str, int] | None = None, zero_stage: int = 0, prepare: Callable[[int], None] | None = None) -> list[int]:
    """Run PPO in `world` new processes, under DeepSpeed where there is a `zero_stage`; how each ended: 0, an exit code, or minus the signal that killed it."""
    port = free_port()
    children = [forked(partial(_run, values, rank, world, port, death, zero_stage, prepare)) for rank in range(world)]
    first, status = os.wait()
    ended = {first: os.waitstatus_to_exitcode(status)}
    for child in children:
        if child in ended:
            continue
        if ended[first] != 0:  # a launcher ends the others when one has died
            os.kill(child, signal.SIGKILL)
        ended[child] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return [ended[child] for child in children]


def _run(values: dict[str, Any], rank: int, world: int, port: int, death: tuple[str, int] | None, zero_stage: int, prepare: Callable[[int], None] | None) -> None:
    become_rank(rank, world, port)
    if zero_stage:
        os.environ |= environment(zero_stage, rank, port, world)
    if prepare is not None:
        prepare(rank)
    if death is not None:
        arm(*death)
    ppo_runs.run_alone(values)
    leave()
