"""Before and after on the same rows, as pure functions of numpy arrays.

Rows belong to prompts (`groups`, one label per row). Rows of one prompt are not independent, so errors and intervals treat the prompt as the unit.
A figure is a ratio of sums, Σ x / Σ tokens: every token counts alike. Losses are in nats per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from stages.evaluation.statistics import widening

Array = npt.NDArray[np.float64]
RESAMPLES = 10_000
HELD = 2_000_000  # draws held at once
BETTER, WORSE, NEITHER, UNKNOWN = "better", "worse", "no difference beyond noise", "no interval: one {unit} only"


class Sums(NamedTuple):
    """Of each row, [N]: negative log-prob of its completion tokens (nats), how many of them greedy decoding gets right, and how many there are."""

    loss: Array
    correct: Array
    tokens: Array


class Compared(NamedTuple):
    """One figure before and after. difference = after - before with its 95 % interval; standard errors and interval are None with one prompt."""

    before: float
    before_se: float | None
    after: float
    after_se: float | None
    difference: float
    low: float | None
    high: float | None


def by_group(values: Array, groups: Sequence[int]) -> Array:
    """Sums over the rows of each prompt, [G]."""
    _, index = np.unique(np.asarray(groups), return_inverse=True)
    return np.bincount(index, weights=np.asarray(values, dtype=np.float64)).astype(np.float64)


def ratio_and_se(sums: Array, tokens: Array) -> tuple[float, float | None]:
    """Σ sums / Σ tokens over prompts [G], and its standard error: se² = G/(G-1) · Σ (s_g - ratio · t_g)² / (Σ t_g)².

    With one row per prompt and one token per row it is the usual s/√G (Cochran 1977, Sampling Techniques, 6.13).
    """
    ratio, count = float(sums.sum() / tokens.sum()), len(sums)
    if count == 1:
        return ratio, None
    return ratio, float(np.sqrt(count / (count - 1) * ((sums - ratio * tokens) ** 2).sum()) / tokens.sum())


def paired(before: Array, after: Array, tokens: Array, *, seed: int, resamples: int = RESAMPLES) -> Compared:
    """A figure before and after, of sums per prompt [G].

    The interval: 2.5 and 97.5 percentile of the difference over resamples of prompts (paired bootstrap, Koehn 2004), widened about it by `widening`.
    """
    (was, was_se), (now, now_se) = ratio_and_se(before, tokens), ratio_and_se(after, tokens)
    difference, count = now - was, len(tokens)
    if count == 1:
        return Compared(was, None, now, None, difference, None, None)
    change, rng, found = after - before, np.random.default_rng(seed), []
    size = max(1, min(resamples, HELD // count))
    for start in range(0, resamples, size):
        draw = rng.integers(0, count, (min(size, resamples - start), count))
        found.append(change[draw].sum(axis=1) / tokens[draw].sum(axis=1))
    low, high = difference + widening(count) * (np.percentile(np.concatenate(found), [2.5, 97.5]) - difference)
    return Compared(was, was_se, now, now_se, difference, float(low), float(high))


def verdict(low: float | None, high: float | None, *, unit: str = "prompt", higher: bool = False) -> str:
    """What an interval of a difference says, if it leaves 0 out; `higher`: more is better."""
    if low is None or high is None:
        return UNKNOWN.format(unit=unit)
    if low <= 0 <= high:
        return NEITHER
    return BETTER if (low > 0) is higher else WORSE


def compare(before: Sums, after: Sums, groups: Sequence[int], *, seed: int, unit: str = "prompt") -> dict[str, object]:
    """Loss and token accuracy before and after, and the verdict, as JSON. Both are of the same rows; `groups` [N] are their prompts (or texts: `unit`)."""
    assert np.array_equal(before.tokens, after.tokens), "before and after are of the same rows"
    tokens = by_group(before.tokens, groups)
    loss, accuracy = (paired(by_group(was, groups), by_group(now, groups), tokens, seed=seed) for was, now in ((before.loss, after.loss), (before.correct, after.correct)))
    return {
        "rows": len(groups), f"{unit}s": len(tokens), "tokens": int(tokens.sum()), "loss": loss._asdict(), "token_accuracy": accuracy._asdict(),
        "perplexity": {"before": float(np.exp(loss.before)), "after": float(np.exp(loss.after))}, "verdict": verdict(loss.low, loss.high, unit=unit),
    }  # fmt: skip
