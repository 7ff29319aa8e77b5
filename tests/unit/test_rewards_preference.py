"""Accuracy, calibration and shortcuts of preference pairs, against numbers worked out by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest

from rewards.preference import (
    best_shortcut,
    bradley_terry,
    expected_calibration_error,
    pair_accuracy,
    shortcut_baselines,
)


def pair(chosen: str, rejected: str, prompt: object = "a question") -> SimpleNamespace:
    return SimpleNamespace(prompt=prompt, chosen=chosen, rejected=rejected)


def test_accuracy_counts_each_pair_once_and_a_tie_half():
    assert pair_accuracy([1.0, -1.0, 0.0, 2.0]) == 0.625  # (1 + 0 + 0.5 + 1) / 4


def test_accuracy_of_ten_pairs_is_not_a_mean_of_batch_means():
    # Batches of 8 and 2: 4/8 and 2/2 have mean 0.75; counted per pair it is 6/10.
    assert pair_accuracy([1] * 4 + [-1] * 4 + [1, 1]) == 0.6


def test_ece_by_hand():
    # σ(2) = 0.8808 falls in the bin [0.85, 0.9): all four right, gap 1 - 0.8808.
    assert expected_calibration_error([2.0] * 4) == pytest.approx(1 - 1 / (1 + math.exp(-2)))
    # Half right at confidence σ(2): gap 0.3808; σ(1) = 0.7311 three of four right: gap 0.0189; halves of eight.
    margins = [2, 2, -2, -2, 1, 1, 1, -1]
    assert expected_calibration_error(margins) == pytest.approx(0.5 * (0.880797 - 0.5) + 0.5 * abs(0.75 - 0.731059), abs=1e-6)


def test_ece_of_calibrated_margins_is_small_and_of_overconfident_ones_large():
    rng = np.random.default_rng(0)
    margins = np.abs(rng.normal(0, 2, 50_000))
    right = rng.random(50_000) < 1 / (1 + np.exp(-margins))
    signed = np.where(right, margins, -margins)
    assert expected_calibration_error(signed) < 0.01
    assert expected_calibration_error(signed * 5) > 0.1


def test_ece_at_certainty_and_at_ties():
    assert expected_calibration_error([1000.0]) == pytest.approx(0)
    assert expected_calibration_error([0.0, 0.0]) == 0  # half right at confidence one half


def test_bradley_terry_at_equal_scores_is_ln_2():
    statistics = bradley_terry([0.0, 0.0])
    assert statistics.loss == pytest.approx(math.log(2))
    assert (statistics.accuracy, statistics.margin, statistics.n) == (0.5, 0.0, 2)
    assert bradley_terry([-1000.0]).loss == pytest.approx(1000)  # no overflow


@pytest.mark.parametrize("margins", [[], [[1.0]], 3.0])
def test_margins_of_a_wrong_shape_are_refused(margins):
    with pytest.raises(ValueError, match="margins have shape"):
        pair_accuracy(margins)


def test_the_direction_of_a_shortcut_is_fitted_on_training_pairs():
    train = [pair("short", "a much longer answer")] * 3 + [pair("a much longer answer", "short")]
    held_out = [pair("a b c", "a b"), pair("a", "a b"), pair("a", "b")]
    baselines = shortcut_baselines(train, held_out)
    # On the training pairs the shorter one wins 3 of 4; held out it wins 1 of 3 and one ties: (0 + 1 + 0.5) / 3.
    assert baselines["shorter wins"] == 0.5
    assert "longer wins" not in baselines


def test_shortcuts_read_what_their_names_say():
    better = pair("Refund of order 17. Sorry!", "no no no no", prompt=[{"role": "user", "content": "refund of my order"}])
    baselines = shortcut_baselines([better], [better])
    wins = {"longer wins", "less repetition wins", "more words of the prompt win", "first word in the prompt wins"}
    wins |= {"more punctuation wins", "more digits win", "more capitals win", "more sentences win", "more characters win"}
    assert baselines == dict.fromkeys(wins, 1.0)


def test_the_best_shortcut():
    assert best_shortcut({"a": 0.5, "b": 0.75}) == ("b", 0.75)
