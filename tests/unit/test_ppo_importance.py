"""Truncated importance sampling: by hand, through the loss, and how far an engine may lie from the policy."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from stages.ppo import maths, report
from stages.ppo.collect import experience_of as experience_from
from stages.ppo.rollout import Rollout
from tests.unit.ppo_samples import config, tokens_of
from tests.unit.test_ppo_update import accelerator, experience_of, largest_difference, module_of, run, weights  # noqa: F401

NAN = float("nan")
MASK = torch.tensor([[True, True, True], [True, False, False]])
OLD = torch.tensor([[math.log(0.5), math.log(0.2), math.log(0.9)], [math.log(0.4), NAN, NAN]])
SAMPLER = torch.tensor([[math.log(0.25), math.log(0.4), math.log(0.9)], [math.log(0.1), NAN, NAN]])


def test_row_8_weights_are_the_probability_ratio_up_to_the_cap():
    """0.5 / 0.25 = 2, 0.2 / 0.4 = 0.5, 0.9 / 0.9 = 1, and 0.4 / 0.1 = 4, which is cut to 3."""
    found = maths.importance_weights(OLD, SAMPLER, MASK, cap=3.0)
    torch.testing.assert_close(found, torch.tensor([[2.0, 0.5, 1.0], [3.0, 1.0, 1.0]]))
    far = maths.importance_weights(torch.zeros(1, 1), torch.full((1, 1), -500.0), torch.ones(1, 1).bool(), cap=float("inf"))
    assert torch.isfinite(far).all()


def test_row_8_the_gap_by_hand():
    """Differences ln 2, ln 2, 0, ln 4: mean ln 2, largest ln 4. k3 of d = old - sampler: 2 - 1 - ln 2, .5 - 1 + ln 2, 0, 4 - 1 - ln 4."""
    gap = maths.sampler_gap(OLD, SAMPLER, MASK, cap=3.0)
    assert gap.largest == pytest.approx(math.log(4), rel=1e-6)
    assert gap.mean == pytest.approx(math.log(2), rel=1e-6)
    assert gap.kl == pytest.approx((1 - math.log(2) - 0.5 + math.log(2) + 3 - math.log(4)) / 4, rel=1e-6)
    assert gap.weight == pytest.approx((2 + 0.5 + 1 + 3) / 4, rel=1e-6)
    assert gap.truncated == pytest.approx(1 / 4)
    assert maths.sampler_gap(OLD, SAMPLER, torch.zeros_like(MASK), cap=3.0) == (0, 0, 0, 1, 0)


def test_row_8_a_token_s_loss_is_multiplied_by_its_weight_and_the_weight_has_no_gradient():
    """Ratio 1.5, advantage 2, clip 0.2: -2.4; at weight 3 that is -7.2. Ratio 1, advantage -1: 1; at weight 0.5 it is 0.5."""
    old = torch.log(torch.tensor([[0.2, 0.4, NAN]]))
    logprobs = torch.log(torch.tensor([[0.3, 0.4, 0.9]])).requires_grad_()
    advantages, mask = torch.tensor([[2.0, -1.0, NAN]]), torch.tensor([[True, True, False]])
    weight = torch.tensor([[3.0, 0.5, NAN]])
    plain = maths.policy_loss(logprobs, old, advantages, mask, clip_range=0.2)
    found = maths.policy_loss(logprobs, old, advantages, mask, clip_range=0.2, weights=weight)
    assert plain.loss.item() == pytest.approx(-2.4 + 1)
    assert found.loss.item() == pytest.approx(-7.2 + 0.5)
    assert (found.clipped, found.approx_kl, found.max_ratio) == (plain.clipped, plain.approx_kl, plain.max_ratio)
    found.loss.backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([[0.0, 0.5, 0.0]]))  # clipped: none; else -advantage * ratio * weight


def test_row_8_the_update_applies_the_weights_for_any_micro_batch_size(accelerator):  # noqa: F811
    """All weights 2 double the policy's gradient; ragged weights give the same new weights for any cut."""
    from dataclasses import replace

    start = module_of()
    plain = experience_of(start)
    generator = torch.Generator().manual_seed(1)
    ragged = torch.rand(plain.tokens.mask.shape, generator=generator) + 0.5
    results = {}
    for name, importance, size in (("plain", None, 4), ("ones", torch.ones_like(ragged), 4), ("twos", 2 * torch.ones_like(ragged), 4), ("ragged", ragged, 8), ("cut", ragged, 3)):
        module = copy.deepcopy(start)
        run(module, replace(plain, importance=importance), accelerator, micro_batch_size=size, vf_coef=0.0)
        results[name] = weights(module)
    before = weights(start)
    assert all(torch.equal(results["plain"][n], results["ones"][n]) for n in before)
    for n in before:
        torch.testing.assert_close(results["twos"][n] - before[n], 2 * (results["plain"][n] - before[n]), atol=1e-6, rtol=1e-3)
    assert largest_difference(results["ragged"], results["cut"]) < 1e-6
    assert largest_difference(results["ragged"], results["plain"]) > 1e-4


def rollout():
    zeros = torch.zeros(2, 3)
    return Rollout(
        tokens_of([[5], [6]], [[7, 8, 9], [7]]), torch.tensor([True, True]), OLD, OLD, torch.zeros(2, 4), torch.tensor([1.0, 2.0]), zeros,
        torch.tensor([[1.0], [2.0]]), torch.ones(2, 1, dtype=torch.bool), SAMPLER,
    )  # fmt: skip


def test_row_8_an_engine_is_weighed_the_native_one_and_a_null_cap_are_not():
    def importance(**engine):
        return experience_from(rollout(), config(engine=engine), kl_coef=0.1, mean=0.0, std=1.0)[0].importance

    assert importance(kind="native") is None
    assert importance(kind="vllm", importance_cap=None) is None
    torch.testing.assert_close(importance(kind="vllm", importance_cap=3.0), torch.tensor([[2.0, 0.5, 1.0], [3.0, 1.0, 1.0]]))
    torch.testing.assert_close(importance(kind="continuous")[1, :1], torch.tensor([2.0]))


def test_row_8_every_iteration_says_how_far_the_engine_is_from_the_policy():
    found = report.sampler_metrics(rollout(), config(engine={"kind": "vllm", "importance_cap": 3.0}))
    assert found["rollout/sampler_gap"] == pytest.approx(math.log(4), rel=1e-6)
    assert found["rollout/sampler_gap_mean"] == pytest.approx(math.log(2), rel=1e-6)
    assert found["rollout/importance_weight"] == pytest.approx(6.5 / 4, rel=1e-6)
    assert found["rollout/importance_truncated"] == pytest.approx(0.25)
    assert found["rollout/sampler_kl"] > 0
    uncapped = report.sampler_metrics(rollout(), config(engine={"kind": "vllm", "importance_cap": None}))
    assert uncapped["rollout/importance_weight"] == pytest.approx(7.5 / 4, rel=1e-6)
    assert uncapped["rollout/importance_truncated"] == 0
