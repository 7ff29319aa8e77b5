"""How a stage starts from the command line, and how its errors reach the person: one line, exit code 2, on one rank."""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from configs.allowed import add_option, with_allowed
from configs.errors import UserError
from configs.printable import printable
from stages.claim import Claim
from stages.devices import hide_gpus_if_asked
from stages.registry import leases
from stages.training import stop, watchdog
from stages.training.ranks import from_rank_0, rank, say
from stages.zero.leave import leave

__all__ = ["rank", "run", "say"]

TRAINING = ("sft", "reward", "dpo", "ppo")
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
SET_BY_LAUNCHERS = ("TORCHELASTIC_RUN_ID", "ALIGN_LAUNCHED")  # by torchrun (and so accelerate launch with several processes), by align
GRACE_SECONDS = 10.0  # for rank 0 to print its message before the launcher ends it because another rank has left


def run(main: Callable[[Any], None], kind: str, argv: Sequence[str] | None = None) -> None:
    """Parse `--config FILE [key=value ...]`, run `main`, and leave with code 0, after a UserError 2, or told to stop 85 (stages/training/stop.py).

    A UserError is printed by rank 0 alone. Other ranks wait a little first: an early exit of theirs would make the
    launcher end rank 0 before it has printed. A rank that fails alone prints for itself.
    """
    parser = argparse.ArgumentParser(prog=f"python -m stages.{kind}", description=main.__doc__)
    parser.add_argument("--config", required=True, metavar="FILE", help="the stage's YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values that replace the file's, such as train.epochs=2")
    add_option(parser)
    arguments = parser.parse_args(argv)
    stop.listen()
    end_with_the_launcher()
    hide_gpus_if_asked()
    held = ExitStack()
    try:
        from configs.load import load
        from stages import models
        from stages.nodes import agree, join
        from stages.training import ready
        from stages.zero import machine

        refuse_foreign_accumulation()
        machine.check_compiler(own_optimizer=kind == "ppo")
        join.join()
        cfg = agree.same_config(lambda: with_allowed(load(arguments.config, kind, arguments.overrides), arguments.allow_changed))
        folder = ready.output_folder(cfg, kind)
        if kind in TRAINING:
            from_rank_0("claiming the working folder", lambda: claim(folder, kind, held))
        watchdog.start(cfg, folder)
        main(from_rank_0("looking up the checkpoints", lambda: models.pinned(cfg)))
    except UserError as error:
        if rank():
            time.sleep(GRACE_SECONDS)
        told = printable(str(error))  # it may quote a row of the data
        print(f"error: {told}" if rank() == 0 else f"error: [rank {rank()}] {told}", file=sys.stderr, flush=True)
        sys.exit(2)
    finally:
        stop.mode(stop.Mode.LEAVING)
        watchdog.end()
        leases.give_back_all()
        held.close()
        leave(sys.exc_info()[1])


def claim(folder: Path, kind: str, held: ExitStack) -> None:
    """Claim the working folder until `held` is closed, for rank 0 to call: two runs would remove each other's saves. `align`, which started this
    process and holds the folder already, lets it in.

    Raises:
        UserError: another run works there.
    """
    held.enter_context(Claim(folder, f"stages.{kind}", here_only=True))


def end_with_the_launcher() -> None:
    """Have Linux end this process when the launcher that started it dies.

    `accelerate launch` starts its processes in sessions of their own: after a kill -9 of the launcher they would train on,
    and the run that is started again would find them writing to its folder. A process that a person started is left alone: under
    nohup it must outlive the shell, which is its parent.
    """
    if not any(name in os.environ for name in SET_BY_LAUNCHERS) or not sys.platform.startswith("linux"):
        return
    launcher = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != launcher:  # it died before the call above
        os.kill(os.getpid(), signal.SIGKILL)


def refuse_foreign_accumulation() -> None:
    """Raise where a machine file sets gradient accumulation: Accelerate lets it override the number given in Python."""
    value = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if value not in ("1", "auto"):
        raise UserError(
            f"the machine file (or environment) sets gradient accumulation to {value}; remove it: "
            "accumulation follows from train.batch_size and train.micro_batch_size"
        )
