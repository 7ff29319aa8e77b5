"""The weighted sum of scorers, with each scorer's own values kept for the metrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

from configs.errors import UserError
from rewards.ensemble import RewardEnsemble
from rewards.protocol import Score, Scorer, Text, check_scores

SPREAD = "spread"  # among a sum's columns: how far the members of its ensembles disagree


class Weighted(NamedTuple):
    """A scorer and its factor in the sum."""

    scorer: Scorer
    weight: float


class Scores(NamedTuple):
    """What `count` completions scored."""

    total: list[float]  # weighted sum over the scorers that apply
    parts: dict[str, list[Score]]  # scorer's name -> its own values, unweighted; None: does not apply. With ensembles also SPREAD


class WeightedSum:
    """A scorer that sums others: score = Σ weight · score of the part."""

    def __init__(self, parts: Sequence[Weighted]) -> None:
        if not parts:
            raise UserError("scorers: there is none; expected at least one")
        self.parts = dict(zip(_unique([part.scorer.name for part in parts]), parts, strict=True))
        self.name = " + ".join(self.parts)

    @property
    def columns(self) -> list[str]:
        """Names of what `score` returns as parts, in order."""
        return [*self.parts, *([SPREAD] if any(isinstance(part.scorer, RewardEnsemble) for part in self.parts.values()) else [])]

    def single(self) -> list[tuple[str, Scorer]]:
        """Every scorer with its name, an ensemble's members in the place of the ensemble."""
        return [
            (name if one is part.scorer else one.name, one)
            for name, part in self.parts.items()
            for one in (part.scorer.members if isinstance(part.scorer, RewardEnsemble) else [part.scorer])
        ]

    @property
    def mean(self) -> float:
        """What centring subtracts: Σ weight · mean score on the demonstrations, over the parts that know theirs."""
        return sum(part.weight * getattr(part.scorer, "mean", 0.0) for part in self.parts.values())

    @property
    def std(self) -> float:
        """Standard deviation on the demonstrations: the single model's, times its weight; 1 where there is none or several."""
        known = [part for part in self.parts.values() if hasattr(part.scorer, "std")]
        return abs(known[0].weight) * known[0].scorer.std if len(known) == 1 else 1.0  # type: ignore[attr-defined]

    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text], **columns: Any) -> list[float]:
        return self.score(prompts, completions, **columns).total

    def score(
        self,
        prompts: Sequence[Text],
        completions: Sequence[Text],
        *,
        token_key: str | None = None,
        prompt_ids: Sequence[Sequence[int]] | None = None,
        completion_ids: Sequence[Sequence[int]] | None = None,
        **columns: Any,
    ) -> Scores:
        """Score completions, by their ids where a part reads the same tokens.

        token_key names the tokenizer and template that prompt_ids and completion_ids come from; a part with the same token_key
        scores those ids (nothing is decoded and tokenised again), every other part reads the text. An ensemble's members are asked
        one by one; the column SPREAD is Σ |weight| · standard deviation between the members.
        """
        count = len(completions)

        def ask(name: str, scorer: Any) -> list[Score]:
            same_tokens = token_key is not None and getattr(scorer, "token_key", None) == token_key
            if same_tokens and prompt_ids is not None and completion_ids is not None:
                returned: Any = scorer.score_ids(prompt_ids, completion_ids, columns.get("finished"))
            else:
                returned = scorer(prompts, completions, **columns)
            return check_scores(name, returned, count)

        parts: dict[str, list[Score]] = {}
        spread = [0.0] * count
        for name, (scorer, weight) in self.parts.items():
            if isinstance(scorer, RewardEnsemble):
                members = cast("list[list[float]]", [ask(member.name, member) for member in scorer.members])  # a reward model scores everything
                combined = scorer.combined(members)
                parts[name] = list(combined.scores)
                spread = [total + abs(weight) * one for total, one in zip(spread, combined.spread, strict=True)]
            else:
                parts[name] = ask(name, scorer)
        total = _weighted_sum(parts, {name: part.weight for name, part in self.parts.items()}, count)
        return Scores(total, parts | ({SPREAD: list(spread)} if SPREAD in self.columns else {}))


def _weighted_sum(parts: dict[str, list[Score]], weights: dict[str, float], count: int) -> list[float]:
    """Σ weight · score per completion. Raises UserError where no part applies: 0 there would be a made-up score."""
    total = []
    for index in range(count):
        values = [(weights[name], scores[index]) for name, scores in parts.items()]
        applicable = [weight * score for weight, score in values if score is not None]
        if not applicable:
            raise UserError(f"scorers {', '.join(parts)}: all returned None for completion {index}; at least one must score it")
        total.append(sum(applicable))
    return total


def _unique(names: list[str]) -> list[str]:
    """Names made distinct: the second "length:40" is "length:40#2"."""
    seen: dict[str, int] = {}
    out = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        out.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return out
