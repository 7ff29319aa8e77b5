"""The mathematics of PPO as pure functions of tensors.

Shapes: B sequences, T completion tokens. Masks are boolean, True counts; what a masked-out position holds, even NaN,
never matters. Log-probs and KL are in nats.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

LOG_RATIO_LIMIT = 20.0  # exp(20) is 5e8: far outside any clip range, far inside float32


class Returns(NamedTuple):
    """Advantages and returns, both [B, T], zero where the mask is False."""

    advantages: Tensor
    returns: Tensor


class PolicyLoss(NamedTuple):
    """Sums over the tokens that count; divide by the token count of the whole optimizer step."""

    loss: Tensor
    clipped: Tensor  # tokens at which the clipped term was the larger one
    approx_kl: Tensor  # k3 estimate of KL(old policy || policy), nats
    max_ratio: Tensor


class SamplerGap(NamedTuple):
    """How far an engine's log-probs of what it sampled lie from those of a training forward, over the tokens that count."""

    largest: float  # |sampler - forward|, nats
    mean: float  # of the same
    kl: float  # k3 estimate of KL(sampler || policy) per token, nats
    weight: float  # mean truncated importance weight
    truncated: float  # share of tokens whose weight was cut to the cap


class ValueLoss(NamedTuple):
    """Sums over the tokens that count."""

    loss: Tensor
    clipped: Tensor


def k1(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
    """KL to the reference per token, logprob - ref_logprob: unbiased, may be negative. [B, T], 0 where masked."""
    return torch.where(mask, logprobs - ref_logprobs, 0.0)


def k3(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
    """KL to the reference per token, e^d - 1 - d with d = ref - logprob: unbiased and never negative.

    Source: http://joschu.net/blog/kl-approx.html. [B, T], 0 where masked.
    """
    difference = torch.where(mask, ref_logprobs - logprobs, 0.0).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return torch.expm1(difference) - difference


def gae(rewards: Tensor, values: Tensor, mask: Tensor, bootstrap: Tensor, *, gamma: float, gae_lambda: float) -> Returns:
    """Generalised advantage estimation, eq. 16 of Schulman et al. 2015 (arXiv:1506.02438).

    `rewards`, `values`, `mask` are [B, T]; `mask` is True on a prefix of each row. `bootstrap` [B] is the value after
    the last real token: 0 for a completion that ended, the value at the cut for one that was cut off.
    """
    rewards, values = torch.where(mask, rewards, 0.0), torch.where(mask, values, 0.0)
    lengths = mask.sum(dim=1)
    following = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    is_last = torch.arange(mask.shape[1], device=mask.device) == (lengths - 1).unsqueeze(1)
    following = torch.where(is_last, bootstrap.unsqueeze(1), following)
    deltas = torch.where(mask, rewards + gamma * following - values, 0.0)
    advantages = torch.zeros_like(deltas)
    running = torch.zeros_like(bootstrap)
    for t in reversed(range(mask.shape[1])):
        running = deltas[:, t] + gamma * gae_lambda * running
        advantages[:, t] = running
    advantages = torch.where(mask, advantages, 0.0)
    return Returns(advantages, torch.where(mask, advantages + values, 0.0))


def whiten(x: Tensor, mask: Tensor, *, shift_mean: bool = True, epsilon: float = 1e-8) -> Tensor:
    """Unit (biased) variance over the positions that count, and zero mean unless `shift_mean` is False.

    Give it the rows of all processes: statistics of one process are another algorithm. [B, T], 0 where masked.
    """
    count = mask.sum().clamp(min=1)
    mean = torch.where(mask, x, 0.0).sum() / count
    variance = torch.where(mask, (x - mean) ** 2, 0.0).sum() / count
    white = (x - mean) * torch.rsqrt(variance + epsilon)
    return torch.where(mask, white if shift_mean else white + mean, 0.0)


def importance_weights(old_logprobs: Tensor, sampler_logprobs: Tensor, mask: Tensor, *, cap: float) -> Tensor:
    """Truncated importance weights, min(exp(old - sampler), cap) per token. [B, T], 1 where masked.

    A completion comes from the engine's distribution, not from the policy's as a training forward computes it: the weight makes
    up for the difference. Source: Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training".
    """
    log_ratio = torch.where(mask, old_logprobs - sampler_logprobs, 0.0).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return torch.where(mask, log_ratio.exp().clamp(max=cap), 1.0)


def sampler_gap(old_logprobs: Tensor, sampler_logprobs: Tensor, mask: Tensor, *, cap: float) -> SamplerGap:
    """Compare log-probs [B, T] of the engine that sampled with those of a training forward; all 0 where nothing was sampled."""
    if not mask.any():
        return SamplerGap(0.0, 0.0, 0.0, 1.0, 0.0)
    count = mask.sum().double()
    distance = torch.where(mask, (sampler_logprobs - old_logprobs).abs(), 0.0)
    weights = importance_weights(old_logprobs, sampler_logprobs, mask, cap=float("inf"))
    kept = torch.where(mask, weights.clamp(max=cap), 0.0)
    kl = k3(sampler_logprobs, old_logprobs, mask)
    return SamplerGap(
        float(distance.max()), float(distance.double().sum() / count), float(kl.double().sum() / count), float(kept.double().sum() / count),
        float(((weights > cap) & mask).sum() / count),
    )  # fmt: skip


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, *,
    clip_range: float, clip_range_high: float | None = None, dual_clip: float | None = None, weights: Tensor | None = None,
) -> PolicyLoss:  # fmt: skip
    """Clipped surrogate, eq. 7 of Schulman et al. 2017 (arXiv:1707.06347), summed over tokens. All [B, T].

    `dual_clip` bounds the loss at negative advantages by -dual_clip * advantage (Ye et al. 2020, arXiv:1912.09729).
    `weights` multiply each token's loss: the importance weights of an engine that is not the policy.
    """
    high = clip_range if clip_range_high is None else clip_range_high
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    advantages = torch.where(mask, advantages, 0.0)
    ratio = log_ratio.exp()
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1.0 - clip_range, 1.0 + high)
    loss = torch.maximum(plain, clipped)
    if dual_clip is not None:
        loss = torch.where(advantages < 0, torch.minimum(loss, -dual_clip * advantages), loss)
    if weights is not None:
        loss = loss * torch.where(mask, weights, 0.0)
    with torch.no_grad():
        was_clipped = ((clipped > plain) & mask).sum()
        approx_kl = torch.where(mask, torch.expm1(log_ratio) - log_ratio, 0.0).sum()
        max_ratio = torch.where(mask, ratio, 0.0).max()
    return PolicyLoss(torch.where(mask, loss, 0.0).sum(), was_clipped, approx_kl, max_ratio)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, clip_range: float) -> ValueLoss:
    """0.5 * max of the squared error and that of the clipped values, summed over tokens. All [B, T].

    Source: Ziegler et al. 2019 (arXiv:1909.08593) and its re-implementations.
    """
    values = torch.where(mask, values, 0.0)
    old_values, returns = torch.where(mask, old_values, 0.0), torch.where(mask, returns, 0.0)
    limited = torch.maximum(torch.minimum(values, old_values + clip_range), old_values - clip_range)
    plain, clipped = (values - returns) ** 2, (limited - returns) ** 2
    loss = 0.5 * torch.maximum(plain, clipped)
    return ValueLoss(torch.where(mask, loss, 0.0).sum(), ((clipped > plain) & mask).sum().detach())


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns) over the tokens that count; 0 when returns do not vary."""
    real_values, real_returns = values[mask].double(), returns[mask].double()
    variance = real_returns.var(unbiased=False) if real_returns.numel() else torch.zeros(())
    if variance <= 1e-12:
        return 0.0
    return float(1.0 - (real_returns - real_values).var(unbiased=False) / variance)


def adapt_kl_coef(kl_coef: float, kl: float, *, target: float, horizon: int, samples: int) -> float:
    """One step of the controller of Ziegler et al. 2019: `kl` is the mean over completions of KL summed over tokens.

    kl_coef * (1 + clip(kl / target - 1, -0.2, 0.2) * samples / horizon); call it once per rollout.
    """
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return kl_coef * (1.0 + error * samples / horizon)
