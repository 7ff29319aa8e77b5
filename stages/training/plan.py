"""How many optimizer steps a stage takes, and which rows each of them sees."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from configs.errors import UserError
from configs.schema import Train


@dataclass(frozen=True)
class Plan:
    """The counts of one training run."""

    rows: int  # training rows of the task
    batch_size: int  # rows per optimizer step, all processes
    accumulation: int  # micro-batches per process and optimizer step
    steps: int  # optimizer steps
    eval_every: int  # optimizer steps
    save_every: int  # optimizer steps
    warmup_steps: int
    general_rows: int = 0  # rows of general text that there are; they are numbered after the task's
    general: int = 0  # of them per optimizer step, within batch_size


def make_plan(train: Train, rows: int, processes: int, *, general_rows: int = 0, share: float = 0.0) -> Plan:
    """Work out a run's steps. Where there are rows of general text, they make up `share` of every optimizer step; epochs are of the task's rows.

    Raises:
        UserError: no rows, fewer rows than a batch, a batch that micro-batches and processes do not divide, or saves that
            miss evaluations although the best one is to be published.
    """
    per_forward = processes * train.micro_batch_size
    if train.batch_size % per_forward:
        raise UserError(
            f"train.batch_size {train.batch_size} is not a multiple of {per_forward} = {processes} process(es) x "
            f"train.micro_batch_size {train.micro_batch_size}; change one of them so that it divides"
        )
    general = max(1, round(share * train.batch_size)) if general_rows else 0
    if general >= train.batch_size:
        raise UserError(f"train.rehearsal.share {share} leaves no row of train.batch_size {train.batch_size} to the task; lower it, or raise train.batch_size")
    own = train.batch_size - general
    if rows < own:
        raise UserError(
            f"there are {rows} training rows, fewer than one batch (train.batch_size {train.batch_size}); "
            "give more data, lower train.batch_size, or check split and max_length"
        )
    epoch = max(1, math.ceil(rows / own))
    steps = train.max_steps or max(1, math.ceil(train.epochs * rows / own - 1e-9))
    eval_every = min(train.eval_every or epoch, steps)
    save_every = min(train.save_every or eval_every, steps)
    if train.early_stopping_patience and save_every != eval_every:
        raise UserError(
            f"train.save_every {train.save_every} differs from train.eval_every {eval_every}; with "
            "train.early_stopping_patience they must be equal, because the best evaluated state is the one published"
        )
    return Plan(
        rows, train.batch_size, train.batch_size // per_forward, steps, eval_every, save_every, math.ceil(train.warmup * steps), general_rows, general
    )


def row_order(plan: Plan, seed: int) -> list[int]:
    """The rows of every optimizer step in turn, [steps * batch_size] indices.

    Each pass is a permutation of its own, seeded by `seed` and the pass; a batch may reach into the next pass. So every
    batch is full, and its rows do not depend on the number of processes, on micro-batches or on where a run was resumed.
    Rows of general text come in passes of their own, plan.general in every batch.
    """
    own = plan.batch_size - plan.general
    task = _passes(plan.rows, plan.steps * own, str(seed))
    if not plan.general:
        return task
    general = [plan.rows + row for row in _passes(plan.general_rows, plan.steps * plan.general, f"{seed}/general")]
    return [
        row for step in range(plan.steps)
        for row in (*task[step * own : (step + 1) * own], *general[step * plan.general : (step + 1) * plan.general])
    ]  # fmt: skip


def _passes(rows: int, needed: int, seed: str) -> list[int]:
    """So many indices of `rows` rows: permutation after permutation."""
    order: list[int] = []
    for epoch in range(math.ceil(needed / rows)):
        indices = list(range(rows))
        random.Random(f"{seed}/{epoch}").shuffle(indices)
        order += indices
    return order[:needed]


def rows_of(plan: Plan, seed: int, step: int) -> list[int]:
    """The rows of optimizer step `step` (from 1), ascending: numbers of the training rows, from 0."""
    return sorted(row_order(plan, seed)[(step - 1) * plan.batch_size : step * plan.batch_size])
