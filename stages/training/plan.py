"""How many optimizer steps a stage takes, and which rows each of them sees."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from configs.errors import UserError
from configs.schema import Train

WINDOW = 50  # optimizer steps whose rows are sorted by length together: more pads less, and makes steps less random


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
    lengths: tuple[int, ...] | None = field(default=None, repr=False)  # tokens of each row of the task, where rows of like length share a step


def make_plan(
    train: Train, rows: int, processes: int, *, general_rows: int = 0, share: float = 0.0, lengths: Sequence[int] | None = None, chooses: str | None = None
) -> Plan:
    """Work out a run's steps. Where there are rows of general text, they make up `share` of every optimizer step; epochs are of the task's rows.
    `chooses`: the setting that has the best evaluated state published, if one has.

    `lengths`: tokens of each row of the task, where rows of like length should share a step.

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
    chooses = chooses or ("train.early_stopping_patience" if train.early_stopping_patience else None)
    if chooses and save_every != eval_every:
        raise UserError(
            f"train.save_every {train.save_every} differs from train.eval_every {eval_every}; with "
            f"{chooses} they must be equal, because the best evaluated state is the one published"
        )
    return Plan(
        rows, train.batch_size, train.batch_size // per_forward, steps, eval_every, save_every, math.ceil(train.warmup * steps), general_rows, general,
        tuple(lengths) if lengths is not None else None,
    )  # fmt: skip


def row_order(plan: Plan, seed: int) -> list[int]:
    """The rows of every optimizer step in turn, [steps * batch_size] indices.

    Each pass is a permutation of its own, seeded by `seed` and the pass; a batch may reach into the next pass. So every
    batch is full, and its rows do not depend on the number of processes, on micro-batches or on where a run was resumed.
    Rows of general text come in passes of their own, plan.general in every batch.
    """
    own = plan.batch_size - plan.general
    task = _passes(plan.rows, plan.steps * own, str(seed))
    if plan.lengths is not None:
        task = _like_lengths_together(task, own, plan.lengths, seed)
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


def _like_lengths_together(order: list[int], size: int, lengths: Sequence[int], seed: int) -> list[int]:
    """The order, of steps of `size` rows, with rows moved between the steps of one pass, WINDOW at a time, so that a step's rows are of like length.

    The steps themselves stay in a random order. A step that reaches into the next pass stays as it is.
    """
    steps = [order[start : start + size] for start in range(0, len(order), size)]
    whole: dict[int, list[int]] = {}  # steps that lie in one pass, by pass
    for number in range(len(steps)):
        first, last = number * size // len(lengths), ((number + 1) * size - 1) // len(lengths)
        if first == last:
            whole.setdefault(first, []).append(number)
    for epoch, numbers in whole.items():
        draw = random.Random(f"{seed}/{epoch}/lengths")
        for start in range(0, len(numbers), WINDOW):
            window = numbers[start : start + WINDOW]
            rows = sorted((row for number in window for row in steps[number]), key=lengths.__getitem__)
            made = [rows[at : at + size] for at in range(0, len(rows), size)]
            draw.shuffle(made)
            for number, step in zip(window, made, strict=True):
                steps[number] = step
    return [row for step in steps for row in step]


def sorted_steps(lengths: Sequence[int], plan: Plan, seed: int) -> list[int]:
    """The rows of every optimizer step in turn, those of a step by length."""
    order = row_order(plan, seed)
    steps = (sorted(order[start : start + plan.batch_size], key=lengths.__getitem__) for start in range(0, len(order), plan.batch_size))
    return [row for step in steps for row in step]


def padding_share(order: Sequence[int], lengths: Sequence[int], micro_batch_size: int) -> float:
    """The share of tokens that are padding when rows in this order are cut into micro-batches."""
    batches = [[lengths[row] for row in order[at : at + micro_batch_size]] for at in range(0, len(order), micro_batch_size)]
    return 1 - sum(map(sum, batches)) / sum(max(batch) * len(batch) for batch in batches)


def rows_of(plan: Plan, seed: int, step: int) -> list[int]:
    """The rows of optimizer step `step` (from 1), ascending: numbers of the training rows, from 0."""
    return sorted(row_order(plan, seed)[(step - 1) * plan.batch_size : step * plan.batch_size])
