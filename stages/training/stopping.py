"""When a run has stopped improving, and what its published state is chosen by: pure logic over its evaluations, so that a resumed run decides the same."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from transformers import TrainerCallback

from configs.schema import TRLStage


class Rule(NamedTuple):
    """What the best state is chosen by, and when to stop (patience None: at the last step)."""

    metric: str = "evaluation/loss"
    higher: bool = False  # whether more is better
    patience: int | None = None  # evaluations
    min_improvement: float = 0.0  # in units of the metric
    setting: str = "train.early_stopping_patience"  # what asks for it, for messages

    @property
    def key(self) -> str:
        """The metric's name in the Trainer's history."""
        return "eval_" + self.metric.removeprefix("evaluation/")


def rule_of(cfg: TRLStage) -> Rule | None:
    """What a config asks for; None: the last state is published, and nothing stops the run before it."""
    patience, validation = cfg.train.early_stopping_patience, getattr(cfg, "evaluation", None)
    if patience is not None:
        return Rule(patience=patience)
    if validation is None or validation.chosen_by is None:
        return None
    stop = validation.early_stopping
    return Rule(
        validation.chosen_by, validation.higher_is_better, stop.patience if stop else None, stop.min_improvement if stop else 0.0,
        validation.asks,
    )  # fmt: skip


def waited(values: Sequence[float], *, higher: bool, min_improvement: float) -> int:
    """How many evaluations have passed since the last improvement.

    The first value counts as one, and then each that is better than the last that counted by more than `min_improvement`. A NaN never counts.
    Lower is better, 0.1: of 3.0, 2.95, 2.8, 2.75, 2.71 the first and third count, so two have passed since.
    """
    best, since = math.nan, -1
    for value in values:
        gain = (value - best) if higher else (best - value)
        if not math.isnan(value) and (math.isnan(best) or gain > min_improvement):
            best, since = value, 0
        else:
            since += 1
    return max(since, 0)


def stopped_early(log_history: Sequence[dict[str, float]], rule: Rule | None) -> bool:
    """Whether the last `patience` evaluations of the rule's metric brought no improvement."""
    if rule is None or rule.patience is None:
        return False
    values = [entry[rule.key] for entry in log_history if rule.key in entry]
    return waited(values, higher=rule.higher, min_improvement=rule.min_improvement) >= rule.patience


class StopEarly(TrainerCallback):
    """Ends training when the rule says so."""

    def __init__(self, rule: Rule, say: Callable[[str], None]) -> None:
        self.rule, self.say = rule, say

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask the Trainer to stop."""
        if stopped_early(state.log_history, self.rule):
            least = f" by more than {self.rule.min_improvement:g}" if self.rule.min_improvement else ""
            self.say(f"stopped early: no better {self.rule.metric}{least} in {self.rule.patience} evaluations")
            control.should_training_stop = True
