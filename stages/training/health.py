"""Health checks of an SFT run (stages/health/findings.py says what a check is): functions of what the Trainer has logged up to now.

A line of the history is a training log (`loss`, `grad_norm`, …: means since the log before), an evaluation (`eval_loss`), a look at what was forgotten
(`forgetting/…`), or, before the first step, what is known of the data (`data/…`). Every line has its `step`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise
from statistics import fmean, median
from typing import NamedTuple

from configs.schema.health import SFTHealth
from stages.health.findings import Check, Finding, History, Metrics, examine

ENDS = 5  # training logs that are compared, at the least, at either end
EARLY = 50  # optimizer steps: what is logged up to there is about the model that the run starts from
ERRORS, ERRORS_RISE = 2.0, 3.0  # standard errors: a loss that has not fallen by so many is flat; one that has risen by so many has risen
SKIPPED, DROPPED, DUPLICATES = "train/skipped_steps", "data/dropped", "data/near_duplicates"
PERPLEXITY, DROP, CHANGED = "forgetting/perplexity", "forgetting/logprob_drop", "forgetting/changed_answers"
START = "forgetting/start"  # in the line of the model that the others are compared with


class Course(NamedTuple):
    """What checks know of a run beside its history."""

    limits: SFTHealth
    warmup_steps: int


def judged(line: Metrics, before: History, course: Course) -> tuple[dict[str, float], list[Finding]]:
    """A line with what failed in it, and of that what is news."""
    return examine(CHECKS, line, before, course.limits, course)


# -- reading a history


def is_training(line: Metrics) -> bool:
    """Whether it is a log of training steps."""
    return "loss" in line


def is_evaluation(line: Metrics) -> bool:
    """Whether it is an evaluation on the validation rows."""
    return "eval_loss" in line


def loss_of(line: Metrics) -> float:
    """The training loss, nats per token: the task's where general text is mixed in (stages/training/rehearsal.py)."""
    return line["loss"]


def trained_between(history: History, after: float, until: float) -> float | None:
    """Mean training loss of the logs of steps `after` < step <= `until`; None where there are none."""
    found = [loss_of(line) for line in history if is_training(line) and after < line["step"] <= until]
    return fmean(found) if found else None


def ends(lines: History, steps: int) -> tuple[History, History]:
    """The first and as many of the last training logs: those of the first quarter of `steps`, at least ENDS; both empty while they would overlap."""
    count = max(ENDS, sum(line["step"] <= lines[0]["step"] + steps / 4 for line in lines))
    return (lines[:count], lines[-count:]) if len(lines) >= 2 * count else ([], [])


def noise(losses: Sequence[float]) -> float:
    """Variance of a log's loss around its trend: half the mean square of successive differences (von Neumann 1941)."""
    return fmean((later - earlier) ** 2 for earlier, later in pairwise(losses)) / 2


# -- the checks


def overfitting(history: History, course: Course) -> str | None:
    """The validation loss stays above its lowest while the training loss goes on falling."""
    count, seen = course.limits.rising_evaluations, [line for line in history if is_evaluation(line)]
    losses = [line["eval_loss"] for line in seen]
    best = min(range(len(losses)), key=losses.__getitem__)
    if len(losses) - 1 - best < count or min(losses[-count:]) <= (1 + course.limits.min_rise) * losses[best]:
        return None
    before = trained_between(history, seen[best - 1]["step"] if best else 0, seen[best]["step"])
    now = trained_between(history, seen[-2]["step"], seen[-1]["step"])
    if before is None or now is None or now >= before or losses[-1] - now <= course.limits.max_gap:
        return None
    return (
        f"the validation loss was lowest at step {seen[best]['step']:.0f} with {losses[best]:.4g} and is {losses[-1]:.4g}, {count} evaluations in a row above it, "
        f"while the training loss fell {before:.4g} -> {now:.4g}; they are {losses[-1] - now:.3g} nats apart, limit {course.limits.max_gap:g}"
    )


def forgetting(history: History, course: Course) -> str | None:
    """What the starting model could do with other text is lost."""
    start = next((line for line in reversed(history) if START in line), {})
    now, limits, seen = history[-1], course.limits, []
    if PERPLEXITY in now and PERPLEXITY in start and not now[PERPLEXITY] <= limits.max_perplexity_growth * start[PERPLEXITY]:
        growth = now[PERPLEXITY] / start[PERPLEXITY]
        seen.append(f"perplexity of health.plain_text went {start[PERPLEXITY]:.4g} -> {now[PERPLEXITY]:.4g}, x{growth:.2f}, limit x{limits.max_perplexity_growth:g}")
    if DROP in now and not now[DROP] <= limits.max_logprob_drop:
        seen.append(
            f"answers that the starting model gave to health.general_prompts lost {now[DROP]:.3g} nats per token, limit {limits.max_logprob_drop:g}; "
            f"{now[CHANGED]:.0%} of them are no longer the model's choice"
        )
    return "; ".join(seen) or None


def leakage_like_loss(history: History, course: Course) -> str | None:
    """A loss that is low from the start, a validation loss that is lower than it can be, or validation rows that stand in the training rows."""
    now, limits = history[-1], course.limits
    if DUPLICATES in now:
        share = now[DUPLICATES]
        return f"{share:.0%} of the validation rows are (nearly) the same as a training row, limit {limits.max_duplicates:.0%}" if share > limits.max_duplicates else None
    if is_training(now):
        first = now["step"] <= EARLY and not any(map(is_training, history[:-1]))
        return f"the training loss of the first {now['step']:.0f} steps is {loss_of(now):.2g} nats per token" if first and loss_of(now) < limits.min_first_loss else None
    # An evaluation tells of one moment: what is trained on until the next one has a lower loss, if anything.
    before = [line for line in history[:-1] if is_evaluation(line)]
    around = trained_between(history, before[-1]["step"], now["step"]) if before else None
    if around is None or before[-1]["eval_loss"] >= limits.min_validation_share * around:
        return None
    return f"the validation loss at step {before[-1]['step']:.0f} was {before[-1]['eval_loss']:.3g}, and the training loss after it {around:.3g} nats per token"


def flat_loss(history: History, course: Course) -> str | None:
    """Nothing is learned: the newest training losses are no lower than the first ones."""
    if history[-1]["step"] < course.warmup_steps + course.limits.flat_steps:
        return None
    first, last = ends([line for line in history if is_training(line)], course.limits.flat_steps)
    if not first:
        return None
    start, now = [loss_of(line) for line in first], [loss_of(line) for line in last]
    error = ERRORS * math.sqrt(2 * noise(now) / len(now))
    if not fmean(start) - fmean(now) <= error:
        return None
    return f"the training loss was {fmean(start):.4g} and is {fmean(now):.4g} after {history[-1]['step']:.0f} steps (means of {len(start)} logs each, noise ±{error:.2g})"


def learning_rate_too_high(history: History, course: Course) -> str | None:
    """The loss rises, gradients grow, or steps have to be skipped."""
    limits, step, skipped = course.limits, history[-1]["step"], history[-1].get(SKIPPED, 0)
    if skipped > 1 and skipped > limits.max_skipped * step:
        return f"{skipped:.0f} of {step:.0f} optimizer steps were skipped, limit {limits.max_skipped:.0%}"
    lines = [line for line in history if is_training(line)]
    first, last = ends(lines, limits.flat_steps)
    if not first:
        return None
    losses, now = [loss_of(line) for line in lines], [loss_of(line) for line in last]
    lowest = _lowest(losses[: -len(last)], len(last))
    # A rate far too high has undone everything before the second log: the first one stands for itself.
    for before in (lowest, losses[:1]):
        rise, error = fmean(now) - fmean(before), math.sqrt(noise(now) * (1 / len(now) + 1 / len(before)))
        if rise > limits.max_loss_rise * losses[0] and rise > ERRORS_RISE * error:
            return f"the training loss is {fmean(now):.4g} (mean of {len(now)} logs), {losses[0]:.4g} at the start and {fmean(lowest):.4g} at its lowest"
    norms = [median(line.get("grad_norm", math.nan) for line in end) for end in (first, last)]
    if norms[1] > limits.max_norm_growth * norms[0]:
        return f"the gradient norm went {norms[0]:.3g} -> {norms[1]:.3g}, limit x{limits.max_norm_growth:g}"
    return None


def _lowest(losses: Sequence[float], width: int) -> Sequence[float]:
    """The stretch of so many losses with the lowest mean."""
    sums = [0.0, *accumulate(losses)]
    start = min(range(len(losses) - width + 1), key=lambda i: sums[i + width] - sums[i])
    return losses[start : start + width]


def dropped_rows(history: History, course: Course) -> str | None:
    """Much of the data is not trained on, and what is left is the short rows."""
    share = history[-1][DROPPED]
    return f"{share:.0%} of the training rows are longer than max_length and were dropped, limit {course.limits.max_dropped:.0%}" if share > course.limits.max_dropped else None


CHECKS = (
    Check(
        "overfitting", overfitting, "the rows are learned by heart: too many passes over too few of them for so many trained weights",
        "train fewer train.epochs (train.early_stopping_patience publishes the best evaluation), lower train.learning_rate, train adapters (lora), raise "
        "train.weight_decay, or give more data",
        due=is_evaluation,
    ),
    Check(
        "forgetting", forgetting, "training on one kind of rows alone moves the model away from everything else it could do",
        "mix general text in (train.rehearsal), lower train.learning_rate or train.epochs, train adapters (lora); health.max_perplexity_growth and "
        "health.max_logprob_drop if it may forget",
        due=lambda line: PERPLEXITY in line or DROP in line,
    ),
    Check(
        "leakage_like_loss", leakage_like_loss, "the model has seen these answers before: validation rows repeat training rows, init_from was trained on them, or the loss "
        "covers what stands in the prompt already",
        "take duplicates out of `data`, or hold whole groups of them out with split.test_prompts; look at what the loss covers with `align data show`; check what "
        "init_from was trained on",
        due=lambda line: is_training(line) or is_evaluation(line) or DUPLICATES in line,
    ),
    Check(
        "flat_loss", flat_loss, "the learning rate is too low to move the weights, nothing that matters is trained, or there is nothing left to learn in these rows",
        "find a rate with `align sft --find-lr`, raise train.learning_rate, check the target modules of adapters and `align data show`",
        due=is_training,
    ),
    Check(
        "learning_rate_too_high", learning_rate_too_high, "steps are so large that they undo what was learned",
        "lower train.learning_rate (`align sft --find-lr` suggests one), raise train.warmup or train.batch_size, lower train.max_grad_norm",
        due=is_training,
    ),
    Check(
        "dropped_rows", dropped_rows, "max_length is shorter than many rows, so that the long ones, often the hard ones, are missing",
        "raise max_length (the model's positions bound it), or cut long rows yourself",
        due=lambda line: DROPPED in line,
    ),
)  # fmt: skip
