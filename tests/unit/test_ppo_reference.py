"""The real functions against tests/unit/ppo_reference.py on random ragged input whose padding is NaN, under random options."""

from __future__ import annotations

import random

import pytest
import torch

from stages import models
from stages.ppo import maths
from stages.ppo.collect import experience_of
from stages.ppo.modules import PolicyAndValue
from stages.ppo.rollout import Experience, Rollout, Tokens
from stages.ppo.update import update_policy
from tests.unit import ppo_reference as reference
from tests.unit.ppo_samples import config, model_of, ragged_ids, tokens_of

NAN = float("nan")
WIDTH = 7


def options(seed):
    """A config whose every choice in the arithmetic is drawn; clips are narrow enough to bite."""
    draw = random.Random(seed)
    return config(
        scorers=[{"kind": "model", "checkpoint": "reward/x"}], missing_eos=draw.choice(["replace", "subtract", "scale", "none"]),
        missing_eos_penalty=draw.uniform(0, 2), reward_at=draw.choice(["last_token", "post_eos"]), center_scores=draw.random() < 0.7,
        scale_scores=draw.random() < 0.5, score_clip=draw.choice([None, 0.8, 10.0]), gamma=draw.choice([1.0, 0.9]), gae_lambda=draw.choice([0.0, 0.5, 0.95, 1.0]),
        bootstrap_cut_off=draw.random() < 0.7, whiten_advantages=draw.random() < 0.5, whiten_rewards=draw.random() < 0.5, clip_range=draw.choice([0.1, 0.2]),
        sampling={"max_new_tokens": WIDTH}, clip_range_high=draw.choice([None, 0.3]), dual_clip=draw.choice([None, 1.5]), value_clip_range=draw.choice([0.2, 0.5]),
    )  # fmt: skip


def completions_of(seed, rows=6):
    """Random completions; one is empty, one has a single token, one is as wide as the batch."""
    draw = random.Random(seed)
    lengths = [0, 1, WIDTH, *(draw.randint(1, WIDTH) for _ in range(rows - 3))]
    draw.shuffle(lengths)
    normal = lambda count: [draw.gauss(0, 1) for _ in range(count)]  # noqa: E731
    return [reference.Completion(normal(n), normal(n), normal(n + 1), draw.gauss(0, 2), draw.random() < 0.5) for n in lengths]


def padded(rows, width):
    """[B, width] in double precision, NaN after each row's end."""
    return torch.tensor([[*row, *[NAN] * (width - len(row))] for row in rows], dtype=torch.float64)


def mask_of(rows, width):
    return torch.tensor([[t < len(row) for t in range(width)] for row in rows])


def rollout_of(completions):
    mask = mask_of([c.logprobs for c in completions], WIDTH)
    count = len(completions)
    tokens = Tokens(torch.ones(count, 2).long(), torch.ones(count, 2).bool(), torch.ones(count, WIDTH).long(), mask)
    scores = torch.tensor([c.score for c in completions], dtype=torch.float64)
    fixed = dict(
        tokens=tokens, finished=torch.tensor([c.finished for c in completions]), old_logprobs=padded([c.logprobs for c in completions], WIDTH),
        ref_logprobs=padded([c.ref_logprobs for c in completions], WIDTH), values=padded([c.values for c in completions], WIDTH + 1), scores=scores,
        entropy=torch.zeros(count, WIDTH), parts=scores.unsqueeze(1), parts_mask=torch.ones(count, 1, dtype=torch.bool), sampler_logprobs=torch.zeros(count, WIDTH),
    )  # fmt: skip
    return Rollout(**fixed)


def real_rows(x, mask):
    return [row[real].tolist() for row, real in zip(x, mask, strict=True)]


def flat(rows):
    return [x for row in rows for x in row]


@pytest.mark.parametrize("seed", range(60))
def test_rewards_advantages_and_returns_equal_the_slow_ones(seed):
    """Rows 1, 2, 4, 9, 10, 11, 18 and 21 together, to ten digits."""
    cfg, completions = options(seed), completions_of(seed)
    kl_coef, mean, std = 0.3, 0.4, 1.7
    expected = reference.experience(completions, cfg, kl_coef=kl_coef, mean=mean, std=std)
    found, rewards = experience_of(rollout_of(completions), cfg, kl_coef=kl_coef, mean=mean, std=std)
    lengths = mask_of([one.rewards for one in expected], WIDTH + 1)
    assert torch.equal(found.value_mask, lengths), "values are trained where there is a reward, and nowhere else"
    for name, x, rows, mask in (
        ("rewards", rewards, [one.rewards for one in expected], lengths), ("returns", found.returns, [one.returns for one in expected], lengths),
        ("advantages", found.advantages, [one.advantages for one in expected], found.tokens.mask),
    ):  # fmt: skip
        assert flat(real_rows(x, mask)) == pytest.approx(flat(rows), abs=1e-10), name
        assert not x.isnan().any(), name


@pytest.mark.parametrize("seed", range(20))
def test_losses_and_measures_equal_the_slow_ones(seed):
    """Rows 1, 3, 12, 13: sums over tokens divided once, for rows as ragged as they come."""
    cfg, now, old = options(seed), completions_of(seed), completions_of(seed + 1000)
    old = [reference.Completion(o.logprobs, o.ref_logprobs, o.values, o.score, o.finished) for o in _of_lengths(old, now)]
    mask = mask_of([c.logprobs for c in now], WIDTH)
    logprobs, ref, old_logprobs, advantages = (padded(rows, WIDTH) for rows in zip(*((c.logprobs, c.ref_logprobs, o.logprobs, o.ref_logprobs) for c, o in zip(now, old, strict=True)), strict=True))
    values, targets = (padded([c.values[:-1] for c in each], WIDTH) for each in (now, old))
    loss = maths.policy_loss(logprobs, old_logprobs, advantages, mask, clip_range=cfg.clip_range, clip_range_high=cfg.clip_range_high, dual_clip=cfg.dual_clip)
    slow = reference.mean_over_tokens([[reference.policy_token(*token, cfg) for token in zip(c.logprobs, o.logprobs, o.ref_logprobs, strict=True)] for c, o in zip(now, old, strict=True)])
    count = int(mask.sum())
    assert (loss.loss.item() / count, loss.clipped.item() / count) == pytest.approx(slow, abs=1e-10)
    fit = maths.value_loss(values, ref, targets, mask, clip_range=cfg.value_clip_range)
    slow = reference.mean_over_tokens([[reference.value_token(*token, cfg.value_clip_range) for token in zip(c.values, c.ref_logprobs, o.values, strict=False)] for c, o in zip(now, old, strict=True)])
    assert (fit.loss.item() / count, fit.clipped.item() / count) == pytest.approx(slow, abs=1e-10)
    kls = [[reference.k1(p, r) for p, r in zip(c.logprobs, c.ref_logprobs, strict=True)] for c in now]
    assert maths.k1(logprobs, ref, mask).sum(1).tolist() == pytest.approx([sum(row) for row in kls], abs=1e-10)
    assert maths.k3(logprobs, ref, mask).sum(1).tolist() == pytest.approx([sum(map(reference.k3, c.logprobs, c.ref_logprobs)) for c in now], rel=1e-10)
    mean = sum(flat(kls)) / len(kls)
    assert maths.adapt_kl_coef(0.1, mean, target=0.7, horizon=50, samples=len(now)) == pytest.approx(reference.adapted(0.1, [sum(row) for row in kls], 0.7, 50), rel=1e-12)
    assert maths.explained_variance(values, targets, mask) == pytest.approx(
        reference.explained_variance(flat([c.values[:-1] for c in now]), flat([o.values[:-1] for o in old])), abs=1e-10
    )


def _of_lengths(completions, wanted):
    """Completions cut or repeated to the lengths of others."""
    for source, like in zip(completions, wanted, strict=True):
        n, pool = len(like.logprobs), random.Random(len(like.logprobs) + sum(like.values))
        normal = lambda count: [pool.gauss(0, 1) for _ in range(count)]  # noqa: B023, E731
        yield reference.Completion(normal(n), normal(n), normal(n + 1), source.score, source.finished)


@pytest.fixture(scope="module")
def accelerator():
    from accelerate import Accelerator

    return Accelerator(cpu=True)


@pytest.mark.parametrize("seed", range(6))
def test_a_whole_update_has_the_loss_of_the_slow_one(seed, accelerator):
    """From a rollout of a real model with random scores through experience_of and update_policy: the losses and clip fractions it reports."""
    draw = torch.Generator().manual_seed(seed)
    noise = lambda like, size: size * torch.randn(like.shape, generator=draw)  # noqa: E731
    module = PolicyAndValue(model_of(seed=seed), model_of(seed=seed + 50).base_model, models.scalar_head(16, seed=seed), temperature=1.0)
    tokens = tokens_of(*ragged_ids(6, seed=seed, completion=(1, WIDTH)))
    with torch.no_grad():
        now = module(tokens)
    mask, cfg = tokens.mask, options(seed).model_copy(update={"train": config(train={"iterations": 1, "rollout_batch_size": 6, "num_ppo_epochs": 1, "micro_batch_size": 2}).train})
    wide = torch.cat([torch.ones_like(mask[:, :1]), mask], dim=1)
    old, values = torch.where(mask, now.logprobs + noise(now.logprobs, 0.3), NAN), torch.where(wide, now.values + noise(now.values, 0.5), NAN)
    ref = torch.where(mask, now.logprobs + noise(now.logprobs, 0.3), NAN)
    scores, finished = noise(torch.zeros(6), 2.0), torch.rand(6, generator=draw) < 0.5
    rollout = Rollout(
        tokens=tokens, finished=finished, old_logprobs=old, ref_logprobs=ref, values=values, scores=scores, entropy=torch.zeros_like(old), parts=scores.unsqueeze(1),
        parts_mask=torch.ones(6, 1, dtype=torch.bool), sampler_logprobs=torch.where(mask, 0.0, NAN),
    )  # fmt: skip
    completions = [reference.Completion(*row) for row in zip(*(real_rows(x, m) for x, m in ((old, mask), (ref, mask), (values, wide))), scores.tolist(), finished.tolist(), strict=True)]
    learned = reference.experience(completions, cfg, kl_coef=0.1, mean=0.2, std=1.5)
    experience, _ = experience_of(rollout, cfg, kl_coef=0.1, mean=0.2, std=1.5)
    metrics = _losses(module, accelerator, experience, cfg)
    triples = zip(real_rows(now.logprobs, mask), completions, learned, strict=True)
    policy = [[reference.policy_token(*token, cfg) for token in zip(lp, c.logprobs, one.advantages, strict=True)] for lp, c, one in triples]
    triples = zip(real_rows(now.values, wide), completions, learned, strict=True)
    value = [[reference.value_token(*token, cfg.value_clip_range) for token in zip(v, c.values, one.returns, strict=False)] for v, c, one in triples]
    assert (metrics["policy/loss"], metrics["policy/clip_fraction"]) == pytest.approx(reference.mean_over_tokens(policy), abs=2e-5)
    assert (metrics["value/loss"], metrics["value/clip_fraction"]) == pytest.approx(reference.mean_over_tokens(value), abs=2e-5)
    assert metrics["policy/clip_fraction"] > 0
    assert metrics["value/clip_fraction"] > 0


def _losses(module: PolicyAndValue, accelerator, experience: Experience, cfg) -> dict[str, float]:
    return update_policy(module, torch.optim.SGD(module.parameters(), lr=0.0), accelerator, experience, cfg, 0)
