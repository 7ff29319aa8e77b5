"""The SFT benchmark: one measurement of both sides with next to no work."""

from __future__ import annotations

import json
import math

import pytest

from tests.bench import sft_sides
from tests.bench.sft_cases import SFT_CASES, prepare, tiny


@pytest.mark.parametrize("name", ["stories260K/padded", "stories260K/packed", "stories260K/lora"])
def test_both_sides_see_the_same_tokens_and_learn(name, tmp_path):
    """One pass over the same rows is the same number of tokens on both sides, and an untrained model's loss is above log 3."""
    case = tiny(SFT_CASES[name])
    job = json.loads(json.dumps(prepare(tmp_path, case)))
    mine, theirs = sft_sides.ours(job, 0), sft_sides.peer(job, 0)
    assert len(mine["tokens"]) == len(theirs["tokens"]) == case.steps
    if case.setting != "packed":  # four steps of four rows are all sixteen of them
        assert sum(mine["tokens"]) == sum(theirs["tokens"])
    assert math.log(3) < mine["eval_loss"] < 7
    assert mine["eval_loss"] == pytest.approx(theirs["eval_loss"], rel=0.05)
    assert mine["peak"] >= mine["imports"] > 0
