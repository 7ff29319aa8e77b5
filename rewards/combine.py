"""The weighted sum of scorers, with each scorer's own values kept for the metrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from configs.errors import UserError
from rewards.protocol import Score, Scorer, Text, check_scores


class Weighted(NamedTuple):
    """A scorer and its factor in the sum."""

    scorer: Scorer
    weight: float


class Scores(NamedTuple):
    """What `count` completions scored."""

    total: list[float]  # weighted sum over the scorers that apply
    parts: dict[str, list[Score]]  # scorer's name -> its own values, unweighted; None: does not apply


class WeightedSum:
    """A scorer that sums others: score = Σ weight · score of the part."""

    def __init__(self, parts: Sequence[Weighted]) -> None:
        if not parts:
            raise UserError("scorers: there is none; expected at least one")
        self.parts = dict(zip(_unique([part.scorer.name for part in parts]), parts, strict=True))
        self.name = " + ".join(self.parts)

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
        scores those ids (nothing is decoded and tokenised again), every other part reads the text.
        """
        parts: dict[str, list[Score]] = {}
        for name, (scorer, _) in self.parts.items():
            same_tokens = token_key is not None and getattr(scorer, "token_key", None) == token_key
            if same_tokens and prompt_ids is not None and completion_ids is not None:
                returned: Any = scorer.score_ids(prompt_ids, completion_ids, columns.get("finished"))  # type: ignore[attr-defined]
            else:
                returned = scorer(prompts, completions, **columns)
            parts[name] = check_scores(name, returned, len(completions))
        weights = {name: part.weight for name, part in self.parts.items()}
        return Scores(_weighted_sum(parts, weights, len(completions)), parts)


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
