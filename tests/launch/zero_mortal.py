"""SFT, reward and DPO in one or more processes, with DeepSpeed or without, that die at a chosen point as if the kernel had killed them.

Processes are forked from the test's own, which has everything imported; that a real `accelerate launch` works is shown by test_zero.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

from stages.training import guarding, saves
from stages.zero.leave import leave
from tests.forked import forked, free_port
from tests.stage.runs import run

Death = tuple[str, int]


def environment(zero_stage: int, rank: int, port: int, world: int = 2) -> dict[str, str]:
    """What `accelerate launch` makes of a CPU machine file; `zero_stage` 0: without DeepSpeed."""
    common = {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    if not zero_stage:
        return (common if world > 1 else {}) | {"ACCELERATE_USE_CPU": "true"}
    return common | {
        "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(zero_stage), "ACCELERATE_DEEPSPEED_ZERO3_INIT": str(zero_stage == 3).lower(),
        "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none", "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none",
    }  # fmt: skip


def run_in_two(
    stage: str, values: dict[str, Any], zero_stage: int, dies_at: int | None = None, around: Callable[[], AbstractContextManager[Any]] = nullcontext
) -> list[int]:
    """Run a stage in two new processes, within `around()`, which are killed in optimizer step `dies_at`; how each ended: an exit code, or minus the signal."""
    return run_in_processes(stage, values, 2, zero_stage, ("step", dies_at) if dies_at is not None else None, around=around)


def run_in_processes(
    stage: str, values: dict[str, Any], world: int, zero_stage: int = 0, death: Death | None = None, prepare: Callable[[int], None] | None = None,
    around: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> list[int]:  # fmt: skip
    """Run a stage in `world` new processes, within `around()`, that die as `arm` says; how each ended: an exit code, or minus the signal. `prepare(rank)` is
    called in each first."""
    port = free_port()
    children = [
        forked(partial(_run, stage, values, death, environment(zero_stage, rank, port, world), prepare, around)) for rank in range(world)
    ]  # fmt: skip
    ended: dict[int, int] = {}
    while len(ended) < world:
        child, status = os.wait()
        ended[child] = os.waitstatus_to_exitcode(status)
        for other in set(children) - set(ended) if ended[child] else ():  # a launcher ends the others when one has died
            os.kill(other, signal.SIGKILL)
    return [ended[child] for child in children]


def _run(
    stage: str, values: dict[str, Any], death: Death | None, variables: dict[str, str], prepare: Callable[[int], None] | None,
    around: Callable[[], AbstractContextManager[Any]],
) -> None:  # fmt: skip
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ.update(variables)
    if prepare is not None:
        prepare(int(variables.get("RANK", "0")))
    if death is not None:
        arm(*death)
    with around():
        run(stage, values)
    leave()


def die(*_: Any, **__: Any) -> None:
    """End this process now: nothing is flushed, nothing is closed."""
    os.kill(os.getpid(), signal.SIGKILL)


def at_call(number: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, but the call of this number (from 1) does not return from dying instead."""
    calls = 0

    def counted(*arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            die()
        return function(*arguments, **keywords)

    return counted


def arm(point: str, number: int) -> None:
    """Die between the backward pass of optimizer step `number` (from 1) and what follows it; or in this process's save of that number: with its files
    written and not hashed ("written"), with its list of files not written ("seal"), renamed and not read back ("renamed"), read back and the
    older ones still there ("proven")."""

    def in_step(self: Any, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step + 1 == number:
            die()

    if point == "step":
        guarding.SkipSteps.on_pre_optimizer_step = in_step  # type: ignore[method-assign]
        return
    name = {"written": "recorded", "seal": "seal", "renamed": "differs", "proven": "rotate"}[point]
    setattr(saves, name, at_call(number, getattr(saves, name)))
