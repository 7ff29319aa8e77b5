"""Which rows an optimizer step has: each once a pass, of like length where that is asked for, and how much of a batch is padding."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise

import pytest

from stages.training import plan

LENGTHS = tuple(random.Random(0).choices(range(4, 200), k=90))
PLAN = plan.Plan(rows=90, batch_size=8, accumulation=2, steps=24, eval_every=1, save_every=1, warmup_steps=0, lengths=LENGTHS)


def test_every_row_once_a_pass_and_steps_between_passes_as_they_were():
    """90 rows in steps of 8: step 12 has the last two rows of the first pass and six of the second."""
    order, plain = plan.row_order(PLAN, 0), plan.row_order(replace(PLAN, lengths=None), 0)
    assert sorted(order[:90]) == sorted(order[90:180]) == list(range(90))
    assert order[88:96] == plain[88:96]
    assert order != plain
    assert sorted(order) == sorted(plain)
    assert order == plan.row_order(PLAN, 0) != plan.row_order(PLAN, 1)


def test_a_steps_rows_are_of_like_length_and_steps_are_in_no_order_of_length():
    order = plan.row_order(PLAN, 0)
    steps = [sorted(LENGTHS[row] for row in order[at : at + 8]) for at in range(0, 88, 8)]
    ranges = sorted((step[0], step[-1]) for step in steps)
    assert all(one[1] <= other[0] for one, other in pairwise(ranges)), "steps overlap in length"
    assert [step[0] for step in steps] != sorted(step[0] for step in steps)


def test_padding_by_hand():
    """Micro-batches (2, 4) and (3, 3): two tokens of 14 are padding; in the order (2, 3), (4, 3) it is two of 14 as well; sorted (2, 3), (3, 4)."""
    assert plan.padding_share([0, 1, 2, 3], [2, 4, 3, 3], 2) == pytest.approx(2 / 14)
    assert plan.padding_share([0, 1, 2], [5, 5, 1], 2) == 0


def test_like_lengths_pad_less_than_sorting_within_steps_which_pads_less_than_chance():
    random_order = plan.row_order(replace(PLAN, lengths=None), 0)
    within, grouped = (plan.sorted_steps(LENGTHS, made, 0) for made in (replace(PLAN, lengths=None), PLAN))
    shares = [plan.padding_share(order, LENGTHS, 4) for order in (grouped, within, random_order)]
    assert shares[0] < shares[1] < shares[2]
    assert shares[0] < 0.1
