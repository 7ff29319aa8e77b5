"""The learning-rate test: its rates, its smoothing, when it stops, and what it suggests, on numbers worked out by hand."""

from __future__ import annotations

import math

import pytest

from configs.errors import UserError
from launch.find_lr_cli import config_of, parse_range
from stages.training.rate_search import Range, has_diverged, smooth, suggest


def test_rates_grow_by_equal_ratios():
    span = Range(1e-4, 1.0, 5)
    assert [span.rate(step) for step in range(5)] == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1, 1.0])


def test_smoothing_is_an_average_whose_weights_sum_to_one():
    # beta .5: 4; (.5 * 2 + .25 * 4 ... ) -> (.25 * 4 + .5 * 2) / .75 = 8 / 3; (.125 * 4 + .25 * 2 + .5 * 1) / .875 = 12 / 7.
    assert smooth([4.0, 2.0, 1.0], beta=0.5) == pytest.approx([4.0, 8 / 3, 12 / 7])


def test_divergence_is_twice_the_lowest_or_no_number():
    assert not has_diverged([2.0, 1.0])
    assert has_diverged([2.0, 1.0, *[50.0] * 3])
    assert has_diverged([2.0, math.nan])


def test_the_suggestion_is_a_tenth_of_the_rate_at_the_lowest_smoothed_loss():
    # Losses fall to 0 at index 40 and jump then: the smoothed loss is lowest at 40 itself.
    rates = [Range(1e-6, 1.0, 61).rate(step) for step in range(61)]
    found = suggest(rates, [4 - i / 10 for i in range(41)] + [30.0] * 20)
    assert found.at_lowest == rates[40] == pytest.approx(1e-2)
    assert found.suggestion == pytest.approx(1e-3)
    assert found.diverged


def test_the_steepest_fall_is_over_a_tenth_of_the_steps():
    """A step down at the very start is noise; the fall of 1 per step from step 10 on is what counts."""
    losses = [4.3] + [4.0] * 9 + [4.0 - i for i in range(1, 6)] + [9.0] * 5
    rates = [Range(1e-6, 1.0, 20).rate(step) for step in range(20)]
    found = suggest(rates, losses)
    assert 10 <= rates.index(found.steepest) <= 14


def test_a_loss_that_never_falls_suggests_nothing():
    with pytest.raises(UserError, match=r"the loss never fell, not even at a learning rate of 1\.0e-03; lower the first rate of --lr-range"):
        suggest([1e-3, 1e-2, 1e-1], [1.0, 2.0, 3.0])
    with pytest.raises(UserError, match="not finite from the first steps on"):
        suggest([1e-3, 1e-2, 1e-1], [math.nan] * 3)


@pytest.mark.parametrize("text", ["1e-6:1", "1:1e-6:100", "0:1:100", "1e-6:1:9", "a:b:c", "1e-6:inf:100"])
def test_a_range_is_two_rates_and_steps(text):
    with pytest.raises(UserError, match="such as 1e-6:1:100"):
        parse_range(text)


def test_a_range_is_read():
    assert parse_range("1e-6:1:100") == (1e-6, 1.0, 100)


def test_a_test_of_rates_measures_and_chooses_nothing():
    """Functions of the user's are not called, and early stopping does not ask for saves."""
    from configs.schema import SFTStage

    own = {"metrics": [{"kind": "python", "function": "nowhere:f"}], "generate": {}, "metric": "evaluation/f", "mode": "max", "early_stopping": {}}
    cfg = SFTStage.model_validate({"name": "a", "output": "out", "init_from": "base", "data": "rows.jsonl", "evaluation": own, "health": {"plain_text": "text"}})
    found = config_of(cfg, 1.0, 100)
    assert (found.evaluation.own, found.evaluation.asks, found.evaluation.test, found.health.action) == ([], None, False, "off")
