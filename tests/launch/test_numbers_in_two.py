"""Two processes, one of which meets numbers gone bad: both skip the same step, both go back to the same save, under DDP and ZeRO."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import deepspeed  # noqa: F401 - imported before the forks, once
import pytest
import torch
import trl  # noqa: F401

from stages.registry import Registry
from stages.training.ranks import rank
from tests.launch.zero_mortal import run_in_two
from tests.stage.numbers import injected, same
from tests.stage.runs import settings, weights, workspace


@contextmanager
def faults_on_rank_1(folder: Path) -> Iterator[None]:
    """A batch of NaN in step 3 and a weight of NaN in step 6, both on rank 1 only; each rank writes which steps left everything as it was."""
    with injected("batch", {3}, on_rank=1) as recorded, injected("weight", {6}, on_rank=1):
        yield
    steps = recorded[0].steps
    unchanged = [same(steps[i], steps[i + 1]) for i in range(len(steps) - 1)]
    (folder / f"seen-{rank()}.json").write_text(json.dumps({"unchanged": unchanged, "back": same(steps[7], steps[4])}))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("zero_stage", "stage"), [(0, "sft"), (2, "dpo")])
def test_what_one_rank_meets_is_skipped_and_undone_on_both(tmp_path, capfd, monkeypatch, zero_stage, stage):
    """Step 3 is skipped; 6 and 7 too, after which the save of step 4 is gone back to; the last two steps train."""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    workspace(tmp_path, rows=40)
    train = {"max_steps": 10, "save_every": 4, "eval_every": 10, "micro_batch_size": 2}
    values = settings(tmp_path, stage, train, name="two", output=str(tmp_path / "out"), guard={"max_skipped_in_row": 2})
    assert run_in_two(stage, values, zero_stage, around=partial(faults_on_rank_1, tmp_path)) == [0, 0], capfd.readouterr().err[-3000:]
    said = capfd.readouterr().out
    assert "optimizer of checkpoint-4; the rows of steps 5 to 7 are not trained on again" in said
    seen = [json.loads((tmp_path / f"seen-{number}.json").read_text()) for number in range(2)]
    assert [found["back"] for found in seen] == [True, True]
    assert seen[0]["unchanged"] == [False, False, True, False, False, *seen[0]["unchanged"][5:7], False, False, False]
    assert seen[1]["unchanged"][:5] == seen[0]["unchanged"][:5]
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "learning_rate" in line]
    assert [line["train/skipped_steps"] for line in lines] == [0, 0, 1, 1, 1, 2, 3, 3, 3, 3]
    assert [math.isnan(line[f"{stage}/loss"]) for line in lines] == [i in (2, 5, 6) for i in range(10)]
    assert [line["learning_rate"] for line in lines] == pytest.approx([1e-3 * (10 - i) / 10 for i in range(10)])
    published = weights(Registry(tmp_path / "registry").resolve(f"{stage}/two"))
    assert all(torch.isfinite(tensor).all() for tensor in published.values())
