"""A plan corrected by a few steps of the real stage on this machine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from configs.errors import UserError
from launch.command import load_machine
from launch.plan.estimate import Estimate
from launch.plan.excerpt import LONGEST, kept, shares
from launch.plan.make import knobs_of, largest
from launch.plan.measure import run_measured
from launch.plan.ppo import kept_of_rollout
from launch.plan.report import Planned

Step = dict[str, float]
FURTHEST = 2.0  # more or fewer times the activations than were simulated: something else differs too


def corrected(planned: Planned) -> Planned:
    """Peak and hours as measured, and the largest micro-batch and the knobs that follow from them. The stage must be able to start here: its parent
    published, its data there. Where fewer steps were taken than it takes to hold all that the stage holds, the plan stays as it is and says so.

    Raises:
        UserError: it can't start, is planned for several nodes, or for GPUs that are not here.
    """
    import torch

    work, layout = planned.work, planned.layout
    if layout.nodes > 1:
        raise UserError("--measure runs on this machine; leave --nodes out")
    if layout.device.gpu and not torch.cuda.is_available():
        raise UserError(f"--measure runs on this machine, which has no GPU, and the plan is for {layout.device.name}; leave --gpus out, or --measure")
    found = run_measured(work.cfg, work.stage, load_machine(layout.machine_path, layout.processes), layout.processes)
    if len(found["steps"]) < LONGEST:
        note = f"{work.stage}: not corrected: {len(found['steps'])} of {LONGEST} measured steps were taken, and the optimizer's state is there from the second on"
        return replace(planned, notes=(*planned.notes, note))
    measured = found["peak_bytes"] + _left_out(planned)
    factor = factor_of(planned.estimate, measured)
    further = measured - planned.estimate.measured(factor, 0).peak.total
    planned = replace(planned, measured=measured, factor=factor, further=further, measured_hours=_hours(planned, found["steps"]))
    planned = replace(planned, largest_micro_batch=largest(work, layout, planned))
    return replace(planned, knobs=knobs_of(planned)) if planned.knobs or planned.fits is False else planned


def factor_of(found: Estimate, measured: int) -> float:
    """What activations, logits and caches at the simulated peak must be multiplied by to make it `measured` bytes: all else
    follows from shapes. Within limits: what they leave is of parts that are not known."""
    moving = found.moving
    return min(FURTHEST, max(1 / FURTHEST, (measured - (found.peak.total - moving)) / moving)) if moving > 0 else 1.0


def _left_out(planned: Planned) -> int:
    """Bytes that the stage keeps of completions which the measured iterations did not have."""
    work, layout = planned.work, planned.layout
    if work.stage != "ppo" or planned.estimate.where.startswith("rollout"):
        return 0
    return kept_of_rollout(work.job, work.job.rollout_rows - shares(work.cfg, layout.processes)[0] * layout.processes)


def _hours(planned: Planned, steps: Sequence[Step]) -> float | None:
    """Of the whole stage, as `Planned.hours`; None where the number of its steps is not known, or no step of typical rows was taken."""
    work = planned.work
    if len(steps) <= LONGEST or not work.steps:
        return None
    seconds = iteration_seconds(steps[-1], work.cfg, planned.layout.processes) if work.stage == "ppo" else step_seconds(steps[LONGEST:], work.job.accumulation)
    return work.members * work.steps * seconds / 3600


def step_seconds(steps: Sequence[Step], accumulation: int) -> float:
    """Of an optimizer step of so many micro-batches; the shortest of the measured `steps`, for other work on the machine only ever adds."""
    return min(step["whole"] + (accumulation - kept(accumulation)) * step["first"] for step in steps)


def iteration_seconds(parts: Step, cfg: Any, processes: int) -> float:
    """Of an iteration of PPO, from one with a share of its completions, one pass over them and fewer optimizer steps."""
    train, batch = cfg.train, cfg.sampling.generate_batch_size
    share = train.rollout_batch_size // processes
    rows, minibatches = shares(cfg, processes)

    def forwards(completions: int, steps: int) -> int:
        """Micro-batches of a pass in so many optimizer steps."""
        return steps * math.ceil(completions // steps / train.micro_batch_size)

    rollout = parts["rollout"] * math.ceil(share / batch) / math.ceil(rows / batch)
    scoring = parts["scoring"] * forwards(share, 1) / forwards(rows, 1)
    learning = (parts["update"] - parts["optimizer"]) * forwards(share, train.num_minibatches) / forwards(rows, minibatches)
    optimizer = parts["optimizer"] * train.num_minibatches / minibatches
    return rollout + scoring + train.num_ppo_epochs * (learning + optimizer)
