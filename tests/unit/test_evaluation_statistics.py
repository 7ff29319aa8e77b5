"""The statistics of an evaluation against numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from stages.evaluation.statistics import kl_of_completions, mean_and_se, perplexity, widening, win_rate, windows


def test_one_completion_per_prompt_gives_the_usual_standard_error():
    # mean 2.5, s² = (2.25 + 0.25 + 0.25 + 2.25) / 3 = 5/3, se = √(5/3) / √4 = 0.645497
    estimate = mean_and_se([1, 2, 3, 4], groups=[0, 1, 2, 3])
    assert estimate == pytest.approx((2.5, 0.6454972))


def test_completions_of_one_prompt_are_not_independent():
    # Copies of a value add nothing: cluster sums are 2·(-1.5, -0.5, 0.5, 1.5), se = √(4/3 · 4·5) / 8 = 0.645497 again.
    doubled = mean_and_se([1, 1, 2, 2, 3, 3, 4, 4], groups=[0, 0, 1, 1, 2, 2, 3, 3])
    assert doubled == pytest.approx((2.5, 0.6454972))
    # Two prompts whose samples cancel within the prompt: Σ is 0 in each, so the prompts do not differ at all.
    assert mean_and_se([0, 4, 1, 3], groups=[7, 7, 9, 9]) == (2.0, 0.0)
    # Order does not matter, only which prompt a value belongs to.
    assert mean_and_se([1, 2, 3, 4, 1, 2, 3, 4], groups=[0, 1, 2, 3, 0, 1, 2, 3]) == pytest.approx(doubled)


def test_a_single_prompt_has_no_standard_error():
    assert mean_and_se([1.0, 3.0], groups=[0, 0]) == (2.0, None)


@pytest.mark.parametrize(("values", "groups"), [([], []), ([1.0], [0, 1]), ([[1.0]], [0])])
def test_values_and_groups_must_fit(values, groups):
    with pytest.raises(ValueError, match="expected one group per value"):
        mean_and_se(values, groups)


def test_standard_error_covers_the_truth_as_often_as_it_should():
    """Prompts differ more than completions of one prompt do: 95 % intervals must hold the truth about 95 % of the time."""
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(50), 4)
    hits = 0
    for _ in range(400):
        estimate = mean_and_se(np.repeat(rng.normal(0, 1, 50), 4) + rng.normal(0, 0.3, 200), groups)
        hits += abs(estimate.mean) < 2.009 * estimate.se  # t quantile at 49 degrees of freedom
    assert 0.92 <= hits / 400 <= 0.98


def test_win_rate_counts_a_tie_half():
    result = win_rate([1, 5, 3, 0], [0, 1, 2, 3], [0, 5, 4, 1], [0, 1, 2, 3], seed=0)
    assert result.rate == 0.375  # (1 + 0.5 + 0 + 0) / 4
    assert result.low <= 0.375 <= result.high


def test_win_rate_pairs_by_prompt_and_weighs_prompts_alike():
    # Prompt 0: {2, 4} against {1, 3}: wins 2>1, 4>1, 4>3 of 4 = 0.75. Prompt 1: {0} against {9} = 0. Mean of prompts 0.375.
    result = win_rate([2, 4, 0], [0, 0, 1], [1, 9, 3], [0, 1, 0], seed=0)
    assert result.rate == 0.375
    swapped = win_rate([1, 9, 3], [0, 1, 0], [2, 4, 0], [0, 0, 1], seed=0)
    assert swapped.rate == 1 - 0.375


def test_interval_of_a_win_rate_is_that_of_a_share():
    # 75 of 100 won: normal interval 0.75 ± 1.96 · √(0.75 · 0.25 / 100) = 0.665 … 0.835
    result = win_rate([1] * 75 + [-1] * 25, range(100), [0] * 100, range(100), seed=3)
    assert (result.low, result.high) == pytest.approx((0.665, 0.835), abs=0.015)
    assert result == win_rate([1] * 75 + [-1] * 25, range(100), [0] * 100, range(100), seed=3)


def test_interval_is_resampled_by_prompt_not_by_completion():
    # 20 prompts, 50 equal completions each: the interval is as wide as that of 20 coins, not of 1,000.
    values, groups = np.repeat([1] * 10 + [-1] * 10, 50), np.repeat(np.arange(20), 50)
    result = win_rate(values, groups, np.zeros(20), range(20), seed=0)
    assert result.high - result.low == pytest.approx(2 * 1.96 * math.sqrt(0.25 / 20), abs=0.06)


def test_interval_of_few_prompts_by_hand():
    # Rates 1, ½, ½, ½: a resample's mean is ½ + ⅛ · Binomial(4, ¼), whose percentiles are ½ (count 0) and ⅞ (count 3: P(≤2) = 0.949,
    # P(≤3) = 0.996). Widened by √(4/3) · 3.1824 / 1.95996 = 1.8749 about 0.625: 0.625 - 1.8749 · 0.125 = 0.3906; 1.09 is cut to 1.
    result = win_rate([1, 0, 0, 0], range(4), [0] * 4, range(4), seed=0)
    assert result == pytest.approx((0.625, 0.39064, 1.0), abs=1e-4)
    assert win_rate([1], [0], [0], [0], seed=0) == (1.0, 0.0, 1.0)  # one prompt says nothing about others
    assert widening(6) == pytest.approx(1.4367, abs=1e-4)  # √(6/5) · 2.5706 / 1.95996
    assert widening(1000) == pytest.approx(1.0017, abs=1e-4)


def test_interval_of_few_prompts_covers_the_truth():
    """Six prompts whose rates differ, four samples of each: the percentiles alone held the truth 88 times in 100."""
    rng, groups, hits = np.random.default_rng(1), np.repeat(range(6), 4), 0
    for seed in range(1000):
        won = rng.random((6, 4)) < rng.beta(2, 2, (6, 1))
        result = win_rate(np.where(won, 1, -1).ravel(), groups, np.zeros(6), range(6), seed=seed, resamples=500)
        hits += result.low <= 0.5 <= result.high
    assert 0.91 <= hits / 1000 <= 0.98


def test_a_certain_win_has_a_certain_interval():
    assert win_rate([1, 1], [0, 1], [0, 0], [0, 1], seed=0) == (1.0, 1.0, 1.0)


def test_win_rate_needs_the_same_prompts():
    with pytest.raises(ValueError, match="same prompts"):
        win_rate([1, 1], [0, 1], [0, 0], [0, 2], seed=0)


def test_kl_by_hand_and_padding_never_counts():
    nan = float("nan")
    logprobs = [[-1.0, -2.0, nan], [-1.0, nan, nan]]
    reference = [[-1.5, -1.0, nan], [-1.0, nan, nan]]
    mask = [[True, True, False], [True, False, False]]
    k1, k3 = kl_of_completions(logprobs, reference, mask)
    # k1: 0.5 - 1 = -0.5. k3: e^-0.5 - 1 + 0.5 = 0.106531 and e^1 - 1 - 1 = 0.718282, sum 0.824812.
    assert k1 == pytest.approx([-0.5, 0.0])
    assert k3 == pytest.approx([0.8248125, 0.0])


def test_k1_and_k3_estimate_the_same_kl():
    rng = np.random.default_rng(0)
    p, q = np.array([0.6, 0.3, 0.1]), np.array([0.3, 0.3, 0.4])
    drawn = rng.choice(3, (200_000, 1), p=p)
    k1, k3 = kl_of_completions(np.log(p)[drawn], np.log(q)[drawn], np.ones((200_000, 1)))
    exact = float((p * np.log(p / q)).sum())  # 0.6 ln 2 + 0 + 0.1 ln 0.25 = 0.277
    assert exact == pytest.approx(0.277, abs=5e-4)
    assert k1.mean() == pytest.approx(exact, abs=0.01)
    assert k3.mean() == pytest.approx(exact, abs=0.01)
    assert k3.min() >= 0


def test_perplexity_is_the_inverse_of_the_geometric_mean_probability():
    # probabilities 1/2 and 1/8: geometric mean 1/4
    assert perplexity(np.log([0.5, 0.125, 0.9]), [True, True, False]) == pytest.approx(4.0)
    with pytest.raises(ValueError, match="no token"):
        perplexity([0.0], [False])


@pytest.mark.parametrize(("length", "width", "stride"), [(1, 4, 2), (2, 4, 2), (4, 4, 2), (5, 4, 2), (11, 4, 2), (100, 16, 5), (100, 16, 15)])
def test_windows_count_every_token_but_the_first_once(length, width, stride):
    seen = []
    for window in windows(length, width, stride):
        assert window.end - window.start <= width
        assert window.start == 0 or window.scored - window.start >= width - stride
        assert window.start < window.scored
        seen += range(window.scored, window.end)
    assert seen == list(range(1, length))
