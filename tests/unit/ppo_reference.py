"""PPO's arithmetic once more: plain Python, double precision, one completion after the other, no padding, no masks, no torch.

Written from the specification and not from stages/ppo; where both agree on random input, neither is likely to be wrong.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import fmean, pvariance


@dataclass
class Completion:
    """One sampled completion of T tokens; `values` has one more entry, after the last token."""

    logprobs: list[float]
    ref_logprobs: list[float]
    values: list[float]
    score: float
    finished: bool


@dataclass
class Learned:
    """What the update is given of a completion: `advantages` of each token; `returns` of each position that has a value."""

    rewards: list[float]
    advantages: list[float]
    returns: list[float]


def k1(logprob: float, ref: float) -> float:
    return logprob - ref


def k3(logprob: float, ref: float) -> float:
    return math.exp(ref - logprob) - 1 - (ref - logprob)


def shaped(completion: Completion, cfg, mean: float, std: float) -> float:
    """The score after centring, scaling, clipping and the rule for a missing EOS."""
    score = completion.score
    if cfg.center_scores:
        score -= mean
    if cfg.scale_scores:
        score /= std
    if cfg.score_clip is not None:
        score = max(-cfg.score_clip, min(cfg.score_clip, score))
    if completion.finished or cfg.missing_eos == "none":
        return score
    penalty = cfg.missing_eos_penalty
    return {"replace": -penalty, "subtract": score - penalty, "scale": score * penalty}[cfg.missing_eos]


def token_rewards(completion: Completion, score: float, cfg, kl_coef: float) -> list[float]:
    """KL penalty at each token; the score at the last one, or alone one position later where there may be one. Nothing without a token."""
    penalties = [-kl_coef * k1(p, r) for p, r in zip(completion.logprobs, completion.ref_logprobs, strict=True)]
    if not penalties:
        return []
    if cfg.reward_at == "post_eos" and len(penalties) < cfg.sampling.max_new_tokens:
        return [*penalties, score]
    return [*penalties[:-1], penalties[-1] + score]


def whitened(rows: list[list[float]], *, shift_mean: bool) -> list[list[float]]:
    """All numbers of all rows to variance 1 (biased), and to mean 0 if asked."""
    flat = [x for row in rows for x in row]
    mean, scale = fmean(flat), 1 / math.sqrt(pvariance(flat) + 1e-8)
    return [[(x - mean) * scale + (0.0 if shift_mean else mean) for x in row] for row in rows]


def discounted_errors(rewards: list[float], values: list[float], after: float, gamma: float, gae_lambda: float) -> list[float]:
    """Advantage at t: the sum over u >= t of (gamma lambda)^(u - t) times the error of one step at u."""
    following = [*values, after][1:]
    errors = [r + gamma * f - v for r, f, v in zip(rewards, following, values, strict=True)]
    return [sum((gamma * gae_lambda) ** (u - t) * errors[u] for u in range(t, len(errors))) for t in range(len(errors))]


def experience(completions: list[Completion], cfg, *, kl_coef: float, mean: float, std: float) -> list[Learned]:
    """From scores to advantages and returns."""
    rewards = [token_rewards(c, shaped(c, cfg, mean, std), cfg, kl_coef) for c in completions]
    if cfg.whiten_rewards:
        rewards = whitened(rewards, shift_mean=False)
    learned = []
    for completion, row in zip(completions, rewards, strict=True):
        values = completion.values[: len(row)]
        goes_on = cfg.reward_at == "last_token" and cfg.bootstrap_cut_off and not completion.finished
        advantages = discounted_errors(row, values, completion.values[len(row)] if goes_on and row else 0.0, cfg.gamma, cfg.gae_lambda)
        returns = [a + v for a, v in zip(advantages, values, strict=True)]
        learned.append(Learned(row, advantages[: len(completion.logprobs)], returns))
    if cfg.whiten_advantages:
        for one, row in zip(learned, whitened([one.advantages for one in learned], shift_mean=True), strict=True):
            one.advantages = row
    return learned


def policy_token(logprob: float, old: float, advantage: float, cfg) -> tuple[float, bool]:
    """Clipped surrogate of a token, and whether the clip is what counted."""
    ratio = math.exp(max(-20.0, min(20.0, logprob - old)))
    high = 1 + (cfg.clip_range if cfg.clip_range_high is None else cfg.clip_range_high)
    free, limited = -advantage * ratio, -advantage * max(1 - cfg.clip_range, min(high, ratio))
    loss = max(free, limited)
    if cfg.dual_clip is not None and advantage < 0:
        loss = min(loss, -cfg.dual_clip * advantage)
    return loss, limited > free


def value_token(value: float, old: float, target: float, clip: float) -> tuple[float, bool]:
    """Half the larger squared error of a value and of what is left of it within the clip, and whether the clip is what counted."""
    free, limited = (value - target) ** 2, (max(old - clip, min(old + clip, value)) - target) ** 2
    return 0.5 * max(free, limited), limited > free


def mean_over_tokens(rows: list[list[tuple[float, bool]]]) -> tuple[float, float]:
    """One mean over every token of every completion, of the loss and of how often the clip counted."""
    flat = [token for row in rows for token in row]
    return fmean(loss for loss, _ in flat), fmean(clipped for _, clipped in flat)


def explained_variance(values: list[float], returns: list[float]) -> float:
    """1 less the share of the returns' variance that the values miss."""
    return 1 - pvariance([r - v for r, v in zip(returns, values, strict=True)]) / pvariance(returns)


def adapted(kl_coef: float, kls: list[float], target: float, horizon: int) -> float:
    """The KL coefficient after a rollout of completions with these summed KLs."""
    error = fmean(kls) / target - 1
    return kl_coef * (1 + max(-0.2, min(0.2, error)) * len(kls) / horizon)
