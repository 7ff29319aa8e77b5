"""Builds a TRL trainer with the project's arguments, data order, evaluation, saves and progress."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from configs.errors import UserError
from configs.schema import TRLStage
from stages.compat import place_event_files, remove_printers
from stages.training import ready
from stages.training.arguments import trl_arguments
from stages.training.evaluation import Further, Measure, evaluate_exactly, exact
from stages.training.guarding import SkipSteps
from stages.training.plan import Plan, rows_of, sorted_steps
from stages.training.progress import NAMES, Progress
from stages.training.ranks import say
from stages.training.stop_trainer import Beats, StopWhenTold
from stages.training.stopping import StopEarly, rule_of
from stages.training.trainer_saves import saving
from stages.training.watchdog import beating
from stages.tuning.trainer import tuned

Rows = list[dict[str, Any]]


def output_folder(cfg: TRLStage, stage: str) -> Path:
    """The working folder of a stage, made if it is missing."""
    folder = ready.output_folder(cfg, stage)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def in_order(rows: Rows, plan: Plan, seed: int) -> Any:
    """The training rows as a datasets.Dataset in the order of the whole run; rows are stored once.

    Within an optimizer step they are sorted by length: micro-batches then hold little padding, and the step is the same.
    """
    return as_dataset(rows).select(sorted_steps(lengths_of(rows), plan, seed))


def lengths_of(rows: Rows) -> list[int]:
    """Tokens of each row (of a pair: of its longest part)."""
    return [max(len(value) for value in row.values() if isinstance(value, list)) for row in rows]


def as_dataset(rows: Rows) -> Any:
    """Rows as a datasets.Dataset in memory."""
    from datasets import Dataset

    return Dataset.from_list(rows)


def build(
    stage: str, trainer_class: Any, config_class: Any, measure: Measure, *, cfg: TRLStage, plan: Plan, train: Any, validation: Any,
    arguments: dict[str, Any], placeholder: Any = None, watch: Callable[[Any], TrainerCallback] | None = None, further: Further | None = None,
    **constructor: Any,
) -> Any:  # fmt: skip
    """A trainer ready for `.train()`.

    train, validation (may be None): datasets.Dataset of tokenised rows, the first in the order of the run. `arguments` are
    the stage's own TRL arguments, `constructor` the trainer's keywords. `placeholder` goes to the constructor in place of the
    data, for a trainer that would tokenise what it is given; the data is set afterwards, on the Trainer's public attributes.
    `watch(trainer)` gives a callback that may add to what is logged before it is written down.
    `further`: what evaluations measure beside `measure`.

    Raises:
        UserError: an argument that TRL refuses.
    """
    folder = output_folder(cfg, stage)
    shared = trl_arguments(cfg, stage, plan, folder / "resume", has_validation=validation is not None)
    given = {"train_dataset": train, "eval_dataset": validation}
    if placeholder is not None:
        given = {key: placeholder if value is not None else None for key, value in given.items()}
    torch.manual_seed(cfg.seed)  # adapters are drawn in the constructor, before the Trainer sets its seed
    try:
        args = config_class(**shared | arguments)
        trainer = exact(saving(tuned(trainer_class, cfg), stage), beating(measure))(args=args, **given, **constructor)
    except (TypeError, ValueError) as error:
        raise UserError(f"TRL refuses the arguments of stage {stage}: {error}") from error
    trainer.train_dataset, trainer.eval_dataset, trainer.further = train, validation, further
    remove_printers(trainer)
    place_event_files(trainer, folder / "tensorboard")
    callbacks: list[Any] = [*([watch(trainer)] if watch is not None else []), Progress(stage, plan, folder / "metrics.jsonl")]
    if cfg.guard.enabled:
        trainer.skips = SkipSteps(trainer, cfg.guard, lambda step: rows_of(plan, cfg.seed, step))
        callbacks.append(trainer.skips)
    if rule := rule_of(cfg):
        callbacks.append(StopEarly(rule, say))
    for callback in [*callbacks, StopWhenTold(trainer), Beats()]:
        trainer.add_callback(callback)
    return trainer


def final_metrics(trainer: Any, measure: Measure) -> dict[str, float]:
    """The trained model's metrics on its validation rows, under our names; empty where there are none."""
    if trainer.eval_dataset is None:
        return {}
    found = evaluate_exactly(trainer, trainer.eval_dataset, beating(measure))
    if trainer.further is not None:
        found |= trainer.further(trainer, found, final=True)
    return {NAMES.get(key, key): value for key, value in found.items()}
