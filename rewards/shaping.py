"""From raw scores to per-token rewards: centring, clipping, the missing-EOS rule, the KL penalty, and where the score lands."""

from __future__ import annotations

import torch
from torch import Tensor


def shape_scores(
    scores: Tensor, finished: Tensor, *, mean: float, std: float, clip: float | None, missing_eos: str, missing_eos_penalty: float
) -> Tensor:
    """Centre and scale scores [B], clip them, then apply the missing-EOS rule where `finished` [B] is False.

    Order matters: the penalty replaces (or lowers) the centred score, so it means the same for every reward model.
    Source: rows 4 and 18 of the specification; N+ implementation details (arXiv:2403.17031).
    """
    shaped = (scores - mean) / std
    if clip is not None:
        shaped = shaped.clamp(-clip, clip)
    if missing_eos == "none":
        return shaped
    if missing_eos == "replace":
        cut_off = torch.full_like(shaped, -missing_eos_penalty)
    elif missing_eos == "subtract":
        cut_off = shaped - missing_eos_penalty
    else:
        assert missing_eos == "scale", missing_eos
        cut_off = shaped * missing_eos_penalty
    return torch.where(finished, shaped, cut_off)


def per_token_rewards(
    scores: Tensor, kl: Tensor, mask: Tensor, *, kl_coef: float, reward_at: str = "last_token", room: Tensor | None = None
) -> Tensor:
    """-kl_coef * kl at every completion token, plus the score once. `scores` [B], `kl` and `mask` [B, T].

    `last_token` puts the score on the last generated token and returns [B, T]; `post_eos` one position later, as N+ and
    TRL do, and returns [B, T + 1]. Where `room` [B] is False, because the completion has as many tokens as it may, they too put it on
    the last token. A completion without a token gets no score.
    """
    lengths = mask.sum(dim=1)
    rewards = torch.where(mask, -kl_coef * kl, 0.0)
    position = lengths - 1
    if reward_at == "post_eos":
        rewards = torch.cat([rewards, torch.zeros_like(rewards[:, :1])], dim=1)
        position = lengths if room is None else torch.where(room, lengths, position)
    rows = (lengths > 0).nonzero(as_tuple=True)[0]
    rewards[rows, position[rows]] += scores[rows]
    return rewards
