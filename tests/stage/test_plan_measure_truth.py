"""What `--measure` finds against the real stage, run as it is configured: memory of PPO and of SFT without accumulation, time of rows of very different lengths."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest

from configs.schema import PPOStage, SFTStage
from launch.plan import clocks
from launch.plan.allocations import Allocations
from launch.plan.correct import iteration_seconds, step_seconds
from launch.plan.excerpt import LONGEST, MeasuredError, excerpt
from launch.plan.gpus import CPU
from launch.plan.make import plan
from launch.plan.measure import measure
from stages import models, sft
from stages.ppo import train as ppo
from tests.stage import ppo_runs, runs

SLOWER = 4.0  # times that a machine which others use may be slower from one second to the next


def measured(cfg: Any, stage: str, folder: Any) -> dict[str, Any]:
    return measure(models.pinned(excerpt(cfg, stage, 1, folder / "excerpt")), stage, 0 if stage == "ppo" else cfg.train.batch_size)


def really(run: Any, cfg: Any) -> int:
    """The most bytes that the stage's tensors have."""
    with Allocations() as tracker:
        run(models.pinned(cfg))
    return tracker.highest.total


def seconds_of(stage: str, run: Any, cfg: Any, count: int) -> list[dict[str, float]]:
    """The parts of the stage's first steps, followed by no tracker."""
    steps: list[dict[str, float]] = []

    def begin() -> None:
        if len(steps) == count:
            raise MeasuredError

    with (clocks.iterations if stage == "ppo" else clocks.optimizer_steps)(steps, begin), suppress(MeasuredError):
        run(models.pinned(cfg))
    return steps


def test_sft_of_one_micro_batch_a_step_and_one_long_row(tmp_path):
    """Two micro-batches were forced, which hold a set of gradients more (16 % too much), and the longest rows' seconds taken for all (five times too many)."""
    folder = runs.workspace(tmp_path, hidden=192)
    runs.write_rows(folder / "sft.jsonl", [{"prompt": f"{n:04}", "completion": "abcd"} for n in range(39)] + [{"prompt": "abcd" * 10, "completion": "efgh" * 75}])
    cfg = SFTStage.model_validate(runs.settings(folder, "sft", {"batch_size": 4, "micro_batch_size": 4, "max_steps": 10}, max_length=500, split={"validation": 0, "test": 0}))
    found = measured(cfg, "sft", tmp_path)
    real = really(sft.main, cfg)
    assert found["peak_bytes"] == pytest.approx(real, rel=0.05)
    (planned,), _ = plan(cfg, "sft", gpus=1, device=CPU, nodes=1, knobs=False)
    assert planned.work.job.accumulation == 1
    assert planned.estimate.peak.total == pytest.approx(real, rel=0.1)
    steps = seconds_of("sft", sft.main, cfg.model_copy(update={"output": tmp_path / "again"}), 10)
    whole = sorted(step["whole"] for step in steps[1:])
    mean = (whole[0] * (len(whole) - 1) + whole[-1]) / len(whole)  # one of the ten steps has the long row; the others are alike
    said = step_seconds(found["steps"][LONGEST:], 1)
    assert mean / SLOWER < said < mean * SLOWER


def test_ppo_that_samples_more_at_once_than_it_learns_from(tmp_path):
    """One iteration never holds the optimizer's state beside a rollout, and the rollout had two micro-batches' completions (12 and 25 % too little)."""
    folder = ppo_runs.workspace(tmp_path)
    changes = {"iterations": 2, "rollout_batch_size": 16, "num_minibatches": 1, "micro_batch_size": 1, "num_ppo_epochs": 3}
    sampling = {"max_new_tokens": 24, "generate_batch_size": 16, "stop_at_eos": False}
    cfg = PPOStage.model_validate(ppo_runs.settings(folder, "out", changes, sampling=sampling, scorers=[{"kind": "length", "target": 10}], evaluation=None))
    found = measured(cfg, "ppo", tmp_path)
    assert found["peak_bytes"] == pytest.approx(really(ppo.main, cfg), rel=0.05)
    whole = seconds_of("ppo", ppo.main, cfg.model_copy(update={"output": tmp_path / "again"}), 2)
    took, said = min(step["rollout"] + step["scoring"] + step["update"] for step in whole), iteration_seconds(found["steps"][-1], cfg, 1)
    assert took / SLOWER < said < took * SLOWER
