"""PPO under ZeRO-2 whose second process meets numbers gone bad: both skip the step, both go back to the save."""

from __future__ import annotations

import json
from pathlib import Path

import deepspeed  # noqa: F401 - imported before the forks, once
import pytest
import torch

from stages.registry import Registry
from tests.launch import ppo_mortal
from tests.launch.ppo_numbers import run_with_faults
from tests.launch.zero_mortal import environment
from tests.stage.ppo_runs import settings, weights, workspace

TRAIN = {"iterations": 6, "num_ppo_epochs": 1, "save_every": 1, "micro_batch_size": 1}  # several backward passes to a step


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("zero_stage", "optimizer"), [(2, "none"), (2, "cpu")])
def test_what_one_rank_meets_is_skipped_and_undone_on_both(tmp_path, capfd, monkeypatch, zero_stage, optimizer):
    """With the optimizer in main memory too, where DeepSpeed adds up gradients and steps elsewhere."""
    monkeypatch.setattr(ppo_mortal, "environment", lambda *of: environment(*of) | {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": optimizer})
    values = settings(workspace(tmp_path), "two", TRAIN, evaluation=None)
    ended, seen = run_with_faults(values, zero_stage, tmp_path)
    assert ended == [0, 0], capfd.readouterr().err[-3000:]
    assert seen == [{"back": True, "moved": True}] * 2
    lines = [json.loads(line) for line in (Path(values["output"]) / "metrics.jsonl").read_text().splitlines()]
    assert [line.get("policy/skipped_steps") for line in lines] == [0, 1, 0, None, 0, 0]
    assert [line.get("train/back_to_iteration") for line in lines] == [None, None, None, 3, None, None]
    assert all(torch.isfinite(tensor).all() for tensor in weights(Registry(tmp_path / "registry").resolve("ppo/two")).values())
