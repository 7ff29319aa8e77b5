"""SFT, reward and DPO under ZeRO in two processes that die in the middle of a step as if the kernel had killed them.

Processes are forked from the test's own, which has everything imported; that a real `accelerate launch` works is shown by test_zero.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from stages.training import guarding
from stages.zero.leave import leave
from tests.stage.runs import run


def environment(zero_stage: int, rank: int, port: int) -> dict[str, str]:
    """What `accelerate launch` makes of a CPU machine file with DeepSpeed, or (stage 0) of one without."""
    shared = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if not zero_stage:
        return shared | {"ACCELERATE_USE_CPU": "true"}
    return shared | {
        "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(zero_stage), "ACCELERATE_DEEPSPEED_ZERO3_INIT": str(zero_stage == 3).lower(),
        "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none", "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none",
    }  # fmt: skip


def run_in_two(
    stage: str, values: dict[str, Any], zero_stage: int, dies_at: int | None = None, around: Callable[[], AbstractContextManager[Any]] = nullcontext
) -> list[int]:
    """Run a stage in two new processes, within `around()`, which are killed in optimizer step `dies_at`; how each ended: an exit code, or minus the signal."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    sys.stdout.flush()
    children = [_fork(stage, values, dies_at, environment(zero_stage, rank, port), around) for rank in range(2)]
    ended: dict[int, int] = {}
    while len(ended) < 2:
        child, status = os.wait()
        ended[child] = os.waitstatus_to_exitcode(status)
        for other in set(children) - set(ended) if ended[child] else ():  # a launcher ends the others when one has died
            os.kill(other, signal.SIGKILL)
    return [ended[child] for child in children]


def _fork(stage: str, values: dict[str, Any], dies_at: int | None, variables: dict[str, str], around: Callable[[], AbstractContextManager[Any]]) -> int:
    child = os.fork()
    if child:
        return child
    try:
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)
        os.environ.update(variables)
        if dies_at is not None:
            arm(dies_at)
        with around():
            run(stage, values)
        leave()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(1)


def arm(step: int) -> None:
    """Die between the backward pass of an optimizer step (from 1) and what follows it."""

    def die(self: Any, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step + 1 == step:
            os.kill(os.getpid(), signal.SIGKILL)

    guarding.SkipSteps.on_pre_optimizer_step = die  # type: ignore[method-assign]
