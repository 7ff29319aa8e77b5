"""What `align plan --measure` runs of a stage, and what it makes of the seconds and bytes that it finds: by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from configs.schema import PPOStage, SFTStage
from launch.plan.allocations import Peak
from launch.plan.correct import factor_of, iteration_seconds, step_seconds
from launch.plan.estimate import Estimate
from launch.plan.excerpt import LONGEST, TYPICAL, excerpt, rows_of_steps, shares, shortened
from stages.training.plan import make_plan


def ppo(sampled: int = 64, **train) -> PPOStage:
    """A config of 64 completions by one process in single rows, sampled at once."""
    values = {"name": "p", "init_from": "x", "prompts": "p", "scorers": [{"kind": "length", "target": 5}], "sampling": {"max_new_tokens": 8, "generate_batch_size": sampled}}
    return PPOStage.model_validate(values | {"train": {"rollout_batch_size": 64, "micro_batch_size": 1, "num_ppo_epochs": 4} | train})


@pytest.mark.parametrize(
    ("cfg", "expected"),
    [
        (ppo(), (64, 1)),  # all that are sampled at once, although two micro-batches would tell the update's memory
        (ppo(sampled=16), (16, 1)),
        (ppo(sampled=1), (2, 1)),  # the second micro-batch finds the gradients of the first
        (ppo(sampled=16, micro_batch_size=16, num_minibatches=4), (16, 1)),  # 64 / 4 = 16: one micro-batch a step, as it is
        (ppo(sampled=40, micro_batch_size=16, num_minibatches=4), (48, 3)),  # 40 need three steps of one micro-batch
        (ppo(sampled=64, micro_batch_size=16, num_minibatches=2), (64, 1)),  # 32 a step: two micro-batches and more
    ],
)
def test_a_measured_iteration_samples_as_many_at_once_and_accumulates_where_the_stage_does(cfg, expected):
    assert shares(cfg, 1) == expected


def test_two_iterations_hold_the_optimizer_state_with_rollouts_and_a_third_tells_the_time():
    cfg = excerpt(ppo(sampled=16), "ppo", 2, Path("out"))
    assert (cfg.train.iterations, cfg.train.rollout_batch_size) == (LONGEST + 1, 32)
    assert LONGEST == 2
    assert not cfg.sampling.stop_at_eos


@pytest.mark.parametrize(("batch", "expected"), [(4, 4), (8, 8), (64, 8)])
def test_accumulation_stays_one_where_it_is_one(batch, expected):
    """Two micro-batches were forced, which hold one full set of gradients more."""
    cfg = SFTStage.model_validate({"name": "s", "init_from": "x", "data": "d", "train": {"batch_size": batch, "micro_batch_size": 2}})
    assert excerpt(cfg, "sft", 2, Path("out")).train.batch_size == expected


def test_longest_rows_tell_memory_and_micro_batches_as_they_come_tell_time():
    """63 rows of 12 tokens and one of 120 in micro-batches of 4: 15 are 12 wide and one 120, the mean is 18.75."""
    rows = [{"input_ids": [1] * 12}] * 63 + [{"input_ids": [1] * 120}]
    train = SFTStage.model_validate({"name": "s", "init_from": "x", "data": "d", "train": {"batch_size": 4, "micro_batch_size": 4}}).train
    plan = replace(make_plan(train, 64, 1), steps=LONGEST + TYPICAL)
    chosen = [len(row["input_ids"]) for row in rows_of_steps(rows, plan, 0, batch=4, micro_batch=4)]
    assert chosen == [120, 120, 120, 119] * LONGEST + [12] * 4 * TYPICAL
    alike = rows_of_steps(rows[:40], replace(plan, rows=40), 0, batch=4, micro_batch=4)
    assert {len(row["input_ids"]) for row in alike} == {12}  # rows of one length are never padded


def test_pairs_are_as_long_as_their_longer_side_and_equals_are_told_apart_by_what_the_loss_covers():
    pairs = [{"prompt_ids": [1] * n, "chosen_ids": [1] * 3, "rejected_ids": [1] * m} for n, m in ((2, 9), (8, 1), (1, 2), (1, 3))]
    labelled = [{"input_ids": [1] * 5, "labels": [-100] * n + [1] * (5 - n)} for n in (4, 1, 3, 2)]
    train = SFTStage.model_validate({"name": "s", "init_from": "x", "data": "d", "train": {"batch_size": 4, "micro_batch_size": 1}}).train
    for rows, longest in ((pairs, 0), (labelled, 1)):
        chosen = rows_of_steps(rows, replace(make_plan(train, 4, 1), steps=5), 0, batch=4, micro_batch=1)
        assert all(row == rows[longest] for row in chosen[: LONGEST * 4])
        assert len(chosen) == (LONGEST + TYPICAL) * 4


def test_seconds_of_a_step_are_those_measured_and_its_other_micro_batches():
    """2.5 s for two micro-batches and the optimizer, 1 s for one: eight take 2.5 + 6. One alone is measured as it is."""
    steps = [{"first": 1.0, "whole": 2.5}, {"first": 1.5, "whole": 4.0}]
    assert step_seconds(steps, 8) == pytest.approx(8.5)
    assert step_seconds(steps, 2) == pytest.approx(2.5)
    assert step_seconds([{"first": 1.0, "whole": 1.25}], 1) == pytest.approx(1.25)


def test_epochs_repeat_the_update_and_nothing_else():
    """Measured: 16 of 64 completions, one step of 16 micro-batches in 3.2 s and 0.4 s of optimizer. Whole: 4 rollouts of 2 s, 4 × 1 s of scoring, and
    four epochs of (64 micro-batches of 0.2 s + 2 × 0.4 s of optimizer). The rollout and the scoring had been multiplied by the epochs."""
    parts = {"rollout": 2.0, "scoring": 1.0, "update": 3.6, "optimizer": 0.4}
    assert iteration_seconds(parts, ppo(sampled=16, num_minibatches=2), 1) == pytest.approx(8 + 4 + 4 * (12.8 + 0.8))


def test_what_was_measured_scales_what_operations_keep_and_nothing_that_follows_from_shapes():
    """100 bytes of weights and 40 of activations were simulated and 160 measured: 60 of activations."""
    found = Estimate({"forward": Peak(140, {"parameters": 100, "activations": 40}), "load": Peak(100, {"parameters": 100})})
    assert factor_of(found, 160) == pytest.approx(1.5)
    assert found.measured(1.5, 0).peak.total == 160
    assert found.measured(1.5, 0).phases["load"].total == 100
    assert factor_of(found, 90) == 0.5  # fewer than the weights: something else differs, by 30 bytes
    assert found.measured(0.5, -30).peak.total == 90
    assert factor_of(Estimate({"load": Peak(100, {"parameters": 100})}), 90) == 1.0


def test_what_is_a_token_shorter():
    assert shortened({"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "general": False}) == {"input_ids": [1, 2], "labels": [-100, 2], "general": False}
    packed = {"input_ids": [1, 2, 3], "seq_lengths": [1, 2]}
    assert shortened(packed) == packed
    assert shortened({"chosen_ids": [1, 2], "rejected_ids": [3, 4]}) == {"chosen_ids": [1, 2], "rejected_ids": [3]}
    assert shortened({"chosen_ids": [1, 2], "rejected_ids": [3]}) == {"chosen_ids": [1, 2], "rejected_ids": [3]}
