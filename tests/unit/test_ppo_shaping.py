"""From scores to per-token rewards, advantages and returns: where the score lands, and what happens to one that was cut off."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from configs.errors import UserError
from configs.schema import PPOStage
from rewards.shaping import per_token_rewards, shape_scores
from stages.ppo.collect import experience_of
from stages.ppo.rollout import Rollout, Tokens

NAN = float("nan")
FINISHED = torch.tensor([True, False])


def shaped(scores, **changes):
    rule = dict(mean=0.0, std=1.0, clip=None, missing_eos="none", missing_eos_penalty=1.0) | changes
    return shape_scores(torch.tensor(scores, dtype=torch.float64), FINISHED, **rule).tolist()


def test_row_4_each_rule_for_a_missing_eos_by_hand():
    assert shaped([3, 5], missing_eos="none") == [3, 5]
    assert shaped([3, 5], missing_eos="replace") == [3, -1]
    assert shaped([3, 5], missing_eos="replace", missing_eos_penalty=2.5) == [3, -2.5]
    assert shaped([3, 5], missing_eos="subtract", missing_eos_penalty=2.0) == [3, 3]
    assert shaped([3, 5], missing_eos="scale", missing_eos_penalty=0.5) == [3, 2.5]


def test_row_4_the_penalty_comes_after_centring():
    # Mean 4: 3 -> -1 and 5 -> 1. The penalty is -1 whatever the mean is (before centring it would end at -5), or 1 - 2 = -1.
    assert shaped([3, 5], mean=4.0, missing_eos="replace") == [-1, -1]
    assert shaped([3, 5], mean=4.0, missing_eos="subtract", missing_eos_penalty=2.0) == [-1, -1]


def test_row_18_centring_scaling_and_clipping_by_hand():
    # (3 - 1) / 4 = .5, (41 - 1) / 4 = 10; clip acts after centring: 12 - 5 = 7 stays below 10, -20 - 5 becomes -10.
    assert shaped([3, 41], mean=1.0, std=4.0) == [0.5, 10]
    assert shaped([12, -20], mean=5.0, clip=10.0) == [7, -10]


def rewards_of(scores, kl, lengths, **changes):
    kl = torch.tensor(kl, dtype=torch.float64)
    mask = torch.arange(kl.shape[1]) < torch.tensor(lengths).unsqueeze(1)
    return per_token_rewards(torch.tensor(scores, dtype=torch.float64), kl, mask, **{"kl_coef": 0.1, **changes})


def test_row_2_trap_2_the_score_is_on_the_last_real_token():
    # KL .5 and 1 at .1: -.05, -.1; score 2 is added to the last real token, padding full of NaN gets nothing.
    out = rewards_of([2, 3], [[0.5, 1, NAN], [0.5, 1, -2]], [2, 3])
    torch.testing.assert_close(out, torch.tensor([[-0.05, 1.9, 0], [-0.05, -0.1, 3.2]], dtype=torch.float64))


def test_row_2_post_eos_puts_the_score_one_position_later():
    out = rewards_of([2, 3], [[0.5, 1, NAN], [0.5, 1, -2]], [2, 3], reward_at="post_eos")
    torch.testing.assert_close(out, torch.tensor([[-0.05, -0.1, 2, 0], [-0.05, -0.1, 0.2, 3]], dtype=torch.float64))


@pytest.mark.parametrize("reward_at", ["last_token", "post_eos"])
def test_row_21_an_empty_completion_gets_no_reward(reward_at):
    out = rewards_of([7, 3], [[NAN, NAN], [0.5, 1]], [0, 2], reward_at=reward_at)
    assert out[0].eq(0).all()
    assert out[1].sum() == pytest.approx(3 - 0.15)


# -- a rollout's rewards, advantages and returns


def config(**changes):
    return PPOStage(**{"name": "x", "init_from": "x", "prompts": "x", "scorers": [{"kind": "length", "target": 3}], **changes})


def rollout_of(lengths=(3, 2), finished=(True, True), values=None, scores=(1.0, 1.0), kl=0.0, width=3):
    """Rows of the given lengths whose padding is NaN; the values have one more column than the tokens."""
    mask = torch.arange(width) < torch.tensor(lengths).unsqueeze(1)
    rows = len(lengths)
    old = torch.where(mask, -1.0, NAN)
    if values is None:
        values = torch.zeros(rows, width + 1)
    tokens = Tokens(torch.ones(rows, 2).long(), torch.ones(rows, 2).bool(), torch.ones(rows, width).long(), mask)
    zeros = torch.zeros(rows, width)
    raw = torch.tensor(scores)
    return Rollout(
        tokens, torch.tensor(finished), old, old - kl, values, raw, zeros, raw.unsqueeze(1), torch.ones(rows, 1, dtype=torch.bool), old
    )  # fmt: skip


PLAIN = dict(whiten_advantages=False, missing_eos="none", kl_coef=0.0, gae_lambda=0.5)
VALUES = torch.tensor([[0.5, 0.6, 0.8, 0.4], [0.5, 0.8, 0.4, NAN]])


def test_row_9_a_finished_completion_ends_with_value_zero_and_a_cut_one_goes_on():
    # The numbers of test_ppo_maths: [.25, .30, .20] when it ended, [.35, .50, .60] when it was cut at a value of .4.
    ended, _ = experience_of(rollout_of(values=VALUES), config(**PLAIN), kl_coef=0.0, mean=0.0, std=1.0)
    torch.testing.assert_close(ended.advantages[0], torch.tensor([0.25, 0.30, 0.20]))
    torch.testing.assert_close(ended.advantages[1], torch.tensor([0.40, 0.20, 0.0]))  # .3 + .5 * .2; 1 - .8
    cut, _ = experience_of(rollout_of(values=VALUES, finished=(False, False)), config(**PLAIN), kl_coef=0.0, mean=0.0, std=1.0)
    torch.testing.assert_close(cut.advantages[0], torch.tensor([0.35, 0.50, 0.60]))
    torch.testing.assert_close(cut.advantages[1], torch.tensor([0.60, 0.60, 0.0]))  # .3 + .5 * .6; 1 + .4 - .8
    off = config(**PLAIN, bootstrap_cut_off=False)
    none, _ = experience_of(rollout_of(values=VALUES, finished=(False, False)), off, kl_coef=0.0, mean=0.0, std=1.0)
    torch.testing.assert_close(none.advantages, ended.advantages)


def test_row_2_post_eos_trains_a_value_one_position_later_too():
    out, rewards = experience_of(rollout_of(values=VALUES.nan_to_num()), config(**PLAIN, reward_at="post_eos"), kl_coef=0.0, mean=0.0, std=1.0)
    assert rewards.tolist() == [[0, 0, 0, 1], [0, 0, 1, 0]]
    assert out.value_mask.tolist() == [[True] * 4, [True, True, True, False]]
    # Row 2: deltas .8 - .5 = .3; .4 - .8 = -.4; 1 - .4 = .6 -> .6; -.4 + .3 = -.1; .3 - .05 = .25.
    torch.testing.assert_close(out.advantages[1, :2], torch.tensor([0.25, -0.1]))
    torch.testing.assert_close(out.returns[1], torch.tensor([0.75, 0.7, 1.0, 0.0]))


def test_row_2_post_eos_stays_on_the_last_token_of_a_completion_that_has_no_position_after_it():
    """Two rows of at most 3 tokens, values .5 .6 .8 | .4 and .5 .8 | .4, score 1, lambda .5: the full one ends as under last_token."""
    settings = config(**PLAIN, sampling={"max_new_tokens": 3}, bootstrap_cut_off=False)
    late = settings.model_copy(update={"reward_at": "post_eos"})
    both = [experience_of(rollout_of(values=VALUES.nan_to_num()), cfg, kl_coef=0.0, mean=0.0, std=1.0) for cfg in (settings, late)]
    (plain, _), (out, rewards) = both
    assert rewards.tolist() == [[0, 0, 1, 0], [0, 0, 1, 0]]
    assert out.value_mask.tolist() == [[True, True, True, False]] * 2
    torch.testing.assert_close(out.advantages[0], torch.tensor([0.25, 0.30, 0.20]))
    torch.testing.assert_close(out.returns[0], plain.returns[0])
    torch.testing.assert_close(out.advantages[1, :2], torch.tensor([0.25, -0.1]))  # the numbers above: it has such a position


def test_row_1_kl_is_a_penalty_on_every_completion_token():
    rewards = experience_of(rollout_of(kl=0.5), config(**PLAIN), kl_coef=0.2, mean=0.0, std=1.0)[1]
    torch.testing.assert_close(rewards, torch.tensor([[-0.1, -0.1, 0.9, 0], [-0.1, 0.9, 0, 0]]))


def test_row_18_scores_are_centred_and_scaled_only_when_asked():
    scaled = {"scale_scores": True, "scorers": [{"kind": "model", "checkpoint": "reward/x"}]}
    for changes, expected in (({}, -1.0), (scaled, -0.5), ({"center_scores": False}, 1.0)):
        rewards = experience_of(rollout_of(), config(**PLAIN, **changes), kl_coef=0.0, mean=2.0, std=2.0)[1]
        assert rewards.sum(1).tolist() == [expected, expected]


def test_row_10_row_11_whitening_of_advantages_and_rewards():
    rollout = rollout_of(values=torch.randn(2, 4, generator=torch.Generator().manual_seed(0)), scores=(1.0, 3.0), kl=0.3)
    mask = rollout.tokens.mask
    out, _ = experience_of(rollout, config(**PLAIN | {"whiten_advantages": True}), kl_coef=0.1, mean=0.0, std=1.0)
    assert out.advantages[mask].mean().item() == pytest.approx(0, abs=1e-6)
    assert out.advantages[mask].var(unbiased=False).item() == pytest.approx(1, abs=1e-5)
    raw = experience_of(rollout, config(**PLAIN), kl_coef=0.1, mean=0.0, std=1.0)[1][:, :3]
    white = experience_of(rollout, config(**PLAIN, whiten_rewards=True), kl_coef=0.1, mean=0.0, std=1.0)[1][:, :3]
    assert white[mask].mean().item() == pytest.approx(raw[mask].mean().item(), abs=1e-6)
    assert white[mask].var(unbiased=False).item() == pytest.approx(1, abs=1e-5)
    assert white[~mask].eq(0).all()


@pytest.mark.parametrize("reward_at", ["last_token", "post_eos"])
def test_padding_full_of_nan_does_not_reach_the_experience(reward_at):
    clean = rollout_of(values=torch.ones(2, 4), kl=0.1)
    filled = replace(clean, old_logprobs=clean.old_logprobs.nan_to_num(), ref_logprobs=clean.ref_logprobs.nan_to_num())
    assert clean.old_logprobs.isnan().any()
    assert not filled.old_logprobs.isnan().any()
    cfg = config(reward_at=reward_at)
    (dirty, rewards), (expected, same) = (experience_of(r, cfg, kl_coef=0.1, mean=0.0, std=1.0) for r in (clean, filled))
    assert torch.equal(rewards, same)
    assert torch.equal(dirty.advantages, expected.advantages)
    assert torch.equal(dirty.returns, expected.returns)


@pytest.mark.parametrize("field", ["scores", "old_logprobs", "values"])
def test_numbers_that_are_not_finite_are_named(field):
    rollout = rollout_of()
    broken = getattr(rollout, field).clone()
    broken.view(-1)[0] = NAN
    with pytest.raises(UserError, match="not finite"):
        experience_of(replace(rollout, **{field: broken}), config(), kl_coef=0.1, mean=0.0, std=1.0)
