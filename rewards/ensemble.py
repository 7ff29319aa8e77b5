"""Several reward models as one scorer: calibrated to one scale, then the mean, the mean less their disagreement, or the minimum.

Where the members were trained on the same pairs they agree on what the pairs show and differ elsewhere, so their spread says how
far a score can be trusted (Coste et al. 2023, arXiv:2310.02743).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from rewards.protocol import Text


class Combined(NamedTuple):
    """What an ensemble makes of its members' scores, per completion."""

    scores: list[float]
    spread: list[float]  # standard deviation between the calibrated members, in the scores' unit


def combine(
    members: Sequence[Sequence[float]], means: Sequence[float], stds: Sequence[float], *, how: Literal["mean", "minimum"], spread_coef: float
) -> Combined:
    """Scores [K, B] of K members -> one score and spread per completion.

    A preference says nothing about a reward model's zero and little about its scale, so member k is first brought to the members'
    common mean and standard deviation on demonstrations: m + (score - means[k]) * s / stds[k], m and s the averages of `means` and `stds`.
    """
    raw, mean, std = np.asarray(members, dtype=np.float64), np.asarray(means, dtype=np.float64), np.asarray(stds, dtype=np.float64)
    calibrated = mean.mean() + (raw - mean[:, None]) * (std.mean() / std)[:, None]
    spread = calibrated.std(axis=0)
    scores = calibrated.min(axis=0) if how == "minimum" else calibrated.mean(axis=0) - spread_coef * spread
    return Combined(scores.tolist(), spread.tolist())


class RewardEnsemble:
    """Reward models that score together; each reads its own text or ids.

    mean, std: the members' averages, which is what the calibrated members' scores on demonstrations have.
    """

    def __init__(self, members: Sequence[Any], *, how: Literal["mean", "minimum"] = "mean", spread_coef: float = 0.0) -> None:
        assert len(members) > 1, "an ensemble has at least two members"
        self.members, self.how, self.spread_coef = list(members), how, spread_coef
        self.name = f"{self.members[0].name}x{len(self.members)}"
        self.mean = float(np.mean([member.mean for member in self.members]))
        self.std = float(np.mean([member.std for member in self.members]))

    def combined(self, scores: Sequence[Sequence[float]]) -> Combined:
        """The ensemble's scores, from each member's own [K, B]."""
        means, stds = [member.mean for member in self.members], [member.std for member in self.members]
        return combine(scores, means, stds, how=self.how, spread_coef=self.spread_coef)

    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text], **columns: Any) -> list[float]:
        """Scores of text."""
        return self.combined([member(prompts, completions, **columns) for member in self.members]).scores
