"""Finding a learning rate by a range test (Smith 2015, arXiv:1506.01186): the rate grows exponentially from step to step until the loss diverges.

Run on the stage's own model, rows, batch, optimizer and technique; nothing is saved, evaluated or published.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from configs.errors import UserError
from stages.guard.skip import innermost
from stages.training.stop_trainer import StopWhenTold
from stages.zero.shards import data_only

SMOOTHING = 0.9  # of the running mean of losses, per step
DIVERGED = 2.0  # times its lowest: a smoothed loss above that ends the test
BELOW_LOWEST = 10.0  # the suggestion is the rate at the lowest smoothed loss over this


class Range(NamedTuple):
    """Learning rates of a test: `rate(step)` for steps from 0."""

    lowest: float
    highest: float
    steps: int

    def rate(self, step: int) -> float:
        """The rate of an optimizer step: `lowest` in the first, `highest` in the last, equal ratios between."""
        return self.lowest * (self.highest / self.lowest) ** (step / (self.steps - 1))


class Found(NamedTuple):
    """What a test found: rates and losses (nats per token) by step, the losses smoothed, and the rates of interest."""

    rates: list[float]
    losses: list[float]
    smoothed: list[float]
    diverged: bool
    at_lowest: float
    steepest: float
    suggestion: float

    def as_json(self) -> dict[str, Any]:
        """Plain JSON; a loss that is not finite is null."""
        return {key: [v if math.isfinite(v) else None for v in value] if isinstance(value, list) else value for key, value in self._asdict().items()}


def smooth(losses: Sequence[float], beta: float = SMOOTHING) -> list[float]:
    """Exponential moving averages, each divided by the weight it has collected, so that the first is the first loss."""
    out, mean = [], 0.0
    for number, loss in enumerate(losses, 1):
        mean = beta * mean + (1 - beta) * loss
        out.append(mean / (1 - beta**number))
    return out


def has_diverged(losses: Sequence[float]) -> bool:
    """Whether the newest smoothed loss is not finite, or so far above the lowest that nothing is to be learned at higher rates."""
    smoothed = smooth(losses)
    return not math.isfinite(smoothed[-1]) or smoothed[-1] > DIVERGED * min(smoothed)


def suggest(rates: Sequence[float], losses: Sequence[float]) -> Found:
    """The rule: the rate at the lowest smoothed loss, over BELOW_LOWEST; where the loss falls fastest is told beside it.

    Raises:
        UserError: the loss never fell, so that no rate of the range is better than none.
    """
    smoothed = smooth(losses)
    finite = [i for i, loss in enumerate(smoothed) if math.isfinite(loss)]
    if len(finite) < 3:
        raise UserError("the loss is not finite from the first steps on; look for broken rows (`align data check`), or lower the first rate of --lr-range")
    lowest = min(finite, key=smoothed.__getitem__)
    if lowest < 2:
        raise UserError(f"the loss never fell, not even at a learning rate of {rates[0]:.1e}; lower the first rate of --lr-range")
    width = min(lowest, max(1, len(rates) // 10))  # of one step the noise falls fastest
    steepest = min(range(width, lowest + 1), key=lambda i: smoothed[i] - smoothed[i - width]) - width // 2
    return Found(list(rates), list(losses), smoothed, has_diverged(losses), rates[lowest], rates[steepest], rates[lowest] / BELOW_LOWEST)


class GrowingRate(TrainerCallback):
    """Sets the rate before every optimizer step (each parameter group's in its proportion), notes the losses, and stops at divergence."""

    def __init__(self, trainer: Any, span: Range) -> None:
        self.trainer, self.span = trainer, span
        self.rates: list[float] = []
        self.losses: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The schedule is constant: what it has set is replaced."""
        self.rate = self.span.rate(state.global_step)
        for group in innermost(self.trainer.optimizer).param_groups:
            group["lr"] = group.get("initial_lr", args.learning_rate) * self.rate / args.learning_rate

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Every step is logged: its loss is a mean over all ranks, so all of them decide alike."""
        if logs and "loss" in logs:
            self.rates.append(self.rate)
            self.losses.append(logs["loss"])
            if has_diverged(self.losses):
                control.should_training_stop = True


def search(trainer: Any, span: Range) -> Found:
    """Run the test on a trainer that was built for `span.steps` steps at a constant rate with a log at each.

    Raises:
        UserError: no rate of the range is better than none.
    """
    trainer.args.save_strategy, trainer.args.eval_strategy = SaveStrategy.NO, IntervalStrategy.NO
    trainer.remove_callback(StopWhenTold)  # there is nothing to save
    growing = GrowingRate(trainer, span)
    trainer.add_callback(growing)
    with data_only():
        trainer.train()
    return suggest(growing.rates, growing.losses)
