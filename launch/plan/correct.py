"""A plan corrected by two micro-steps of the real stage on this machine."""

from __future__ import annotations

from dataclasses import replace

from configs.errors import UserError
from launch.command import load_machine
from launch.plan.measure import MICRO_STEPS, run_measured
from launch.plan.report import Planned


def corrected(planned: Planned) -> Planned:
    """Peak and hours as measured. The stage must be able to start here: its parent published, its data there.

    Raises:
        UserError: it can't start, or is planned for several nodes.
    """
    work, layout = planned.work, planned.layout
    if layout.nodes > 1:
        raise UserError("--measure runs on this machine; leave --nodes out")
    found = run_measured(work.cfg, work.stage, load_machine(layout.machine_path, layout.processes), layout.processes)
    hours = None
    if found["seconds"] is not None and work.steps:
        rows = MICRO_STEPS * work.job.micro_batch * layout.processes
        per_step = found["seconds"] * (work.job.rollout_rows / rows * work.cfg.train.num_ppo_epochs if work.stage == "ppo" else work.job.accumulation)
        hours = work.members * per_step * work.steps / 3600
    return replace(planned, measured=found["peak_bytes"], measured_hours=hours)
