"""Metrics of completions and labels as functions of sums over rows, so that resamples of prompts need no text: pure, numpy arrays in and out.

Every metric of ours is f(Σ s_i) of a few numbers s_i per row (BLEU's n-gram counts, a label's true positives). A resample of prompts is then a sum with
other weights, and the interval of a difference that of one metric on the same resamples before and after.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from configs.schema.validation import MEASURED
from stages.compat import corpus_sums
from stages.continuing.figures import Array
from stages.evaluation.statistics import widening
from stages.validation.text_metrics import COMPARE

RESAMPLES = 2_000  # BLEU and chrF are calls into sacrebleu, 20 µs each
Figure = Callable[[Array], float]


class RowSums(NamedTuple):
    """[N, S] numbers of each row, and what their sums [S] come to."""

    rows: Array
    figure: Figure


def mean(sums: Array) -> float:
    """Of (Σ values, rows)."""
    return float(sums[0] / sums[1])


def macro_f1(sums: Array) -> float:
    """Of three numbers per label, (right, predicted, there): the mean over labels that were predicted or there of 2 · right / (predicted + there)."""
    right, predicted, there = sums.reshape(-1, 3).T
    seen = predicted + there > 0
    return float((2 * right[seen] / (predicted + there)[seen]).mean())


def of_completions(metrics: Sequence[str], completions: Sequence[str], references: Sequence[str]) -> dict[str, RowSums]:
    """Of each metric of ours among `metrics` that compares completions, by the names that it measures."""
    found: dict[str, RowSums] = {}
    for name in metrics:
        if name in ("bleu", "chrf"):
            found[name] = RowSums(*corpus_sums(name, completions, references))
        elif name in COMPARE:
            rows = [COMPARE[name]([mine], [theirs]) for mine, theirs in zip(completions, references, strict=True)]
            found |= {title: RowSums(np.array([[row[title], 1.0] for row in rows]), mean) for title in MEASURED[name]}
    return found


def of_labels(predicted: Sequence[int], truth: Sequence[int | None], labels: int) -> dict[str, RowSums]:
    """Of accuracy and macro_f1; numbers of labels, of which there are `labels`. A truth of None is none of them: no prediction is right."""
    right = np.array([[float(mine == theirs), 1.0] for mine, theirs in zip(predicted, truth, strict=True)])
    cells = np.zeros((len(predicted), labels, 3))
    for row, (mine, theirs) in enumerate(zip(predicted, truth, strict=True)):
        cells[row, mine, 1] = 1
        if theirs is not None:
            cells[row, theirs, 2] = 1
            cells[row, theirs, 0] = float(mine == theirs)
    return {"accuracy": RowSums(right, mean), "macro_f1": RowSums(cells.reshape(len(predicted), -1), macro_f1)}


def interval(before: RowSums, after: RowSums, groups: Sequence[int], *, seed: int, resamples: int = RESAMPLES) -> tuple[float, float] | None:
    """95 % interval of after - before over resamples of prompts (`groups`, one label per row), as `figures.paired` has it; None with one prompt."""
    _, index = np.unique(np.asarray(groups), return_inverse=True)
    count = int(index.max()) + 1
    if count == 1:
        return None
    per_group = [np.zeros((count, one.rows.shape[1])) for one in (before, after)]
    for sums, one in zip(per_group, (before, after), strict=True):
        np.add.at(sums, index, one.rows)
    weights = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples)
    was, now = (np.array([one.figure(row) for row in weights @ sums]) for sums, one in zip(per_group, (before, after), strict=True))
    difference = after.figure(per_group[1].sum(axis=0)) - before.figure(per_group[0].sum(axis=0))
    low, high = difference + widening(count) * (np.percentile(now - was, [2.5, 97.5]) - difference)
    return float(low), float(high)


def values(sums: Mapping[str, RowSums]) -> dict[str, float]:
    """Each metric over all rows."""
    return {name: one.figure(one.rows.sum(axis=0)) for name, one in sums.items()}
