"""Scores that are compared in a win rate: what rounding alone tells apart is a tie."""

from __future__ import annotations

from stages.ppo.evaluation import ranks


def test_scores_that_rounding_tells_apart_have_one_rank_wherever_they_lie():
    """Largest score 1, so within 1e-5 is equal; 0.500005 is the end of a multiple of 1e-5, on whose two sides the first two lie."""
    ours, theirs = ranks([0.5000049, 0.1, 1.0], [0.5000051, 0.2, 0.09])
    # in order: 0.09, 0.1, 0.2, the two around 0.500005, 1.0
    assert ours.tolist() == [3, 1, 4]
    assert theirs.tolist() == [3, 2, 0]


def test_scores_that_are_all_zero_tie():
    assert [part.tolist() for part in ranks([0.0, 0.0], [0.0])] == [[0, 0], [0]]
