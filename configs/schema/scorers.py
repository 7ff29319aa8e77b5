"""What scores a completion: the trained reward model, rules, or the user's own function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from configs.schema.common import Strict


class _Weighted(Strict):
    weight: float = Field(default=1.0, description="Factor of this scorer in the weighted sum.")


class ModelScorer(_Weighted):
    """A trained reward model."""

    kind: Literal["model"]
    checkpoint: str = Field(description="A registry name such as reward/demo@1.")


class Combination(Strict):
    """How an ensemble's members become one score."""

    combine: Literal["mean", "minimum"] = Field(default="mean", description="minimum: the lowest member decides.")
    spread_coef: float = Field(default=0.0, ge=0, description="mean less this many standard deviations between the members (mean only).")

    @model_validator(mode="after")
    def _one_or_the_other(self) -> Combination:
        if self.combine == "minimum" and self.spread_coef:
            raise ValueError("spread_coef is taken off the mean, and combine is minimum; use one of them")
        return self


class EnsembleScorer(_Weighted, Combination):
    """Several trained reward models as one: what one of them overrates, the others need not."""

    kind: Literal["ensemble"]
    checkpoints: list[str] = Field(min_length=2, description="Registry names such as reward/demo@1. Each member's scores are first brought to one mean and spread on its demonstrations.")

    @model_validator(mode="after")
    def _different(self) -> EnsembleScorer:
        if len(set(self.checkpoints)) < len(self.checkpoints):
            raise ValueError(f"checkpoints names a reward model twice: {', '.join(self.checkpoints)}; give each once")
        return self

    @model_validator(mode="after")
    def _lowered(self) -> EnsembleScorer:
        if self.weight < 0 and (self.combine == "minimum" or self.spread_coef):
            how = "combine: minimum" if self.combine == "minimum" else f"spread_coef {self.spread_coef:g}"
            raise ValueError(f"weight {self.weight:g} turns {how} around: where the members disagree the reward would rise; use combine: mean and spread_coef: 0")
        return self


class LengthScorer(_Weighted):
    """0 at the target length, falling linearly to -1 at 0 or at twice the target, never lower."""

    kind: Literal["length"]
    target: int = Field(ge=1, description="Words.")


class RepetitionScorer(_Weighted):
    """Minus the share of repeated word n-grams, from 0 to -1."""

    kind: Literal["repetition"]
    ngram: int = Field(default=2, ge=1, description="Words in an n-gram.")


class RegexScorer(_Weighted):
    """1 where the pattern is found in the completion, else 0."""

    kind: Literal["regex"]
    pattern: str = Field(description="Python regular expression.")


class KeywordScorer(_Weighted):
    """Share of the words that occur in the completion, compared without case."""

    kind: Literal["keyword"]
    words: list[str] = Field(min_length=1, description="Words to look for.")


class PythonScorer(_Weighted):
    """The user's own function, f(prompts, completions, **columns) -> list[float]."""

    kind: Literal["python"]
    function: str = Field(pattern=r"^[\w.]+:\w+$", description="package.module:function")


ScorerSpec = Annotated[
    ModelScorer | EnsembleScorer | LengthScorer | RepetitionScorer | RegexScorer | KeywordScorer | PythonScorer, Field(discriminator="kind")
]


def _some_weight(scorers: Sequence[Any]) -> Sequence[Any]:
    """Refuse scorers that add up to nothing."""
    if not any(scorer.weight for scorer in scorers):
        raise ValueError(f"the weight of {'the scorer is' if len(scorers) == 1 else f'each of the {len(scorers)} scorers is'} 0, so every completion would score 0; give at least one another weight")
    return scorers


Scorers = Annotated[list[ScorerSpec], Field(min_length=1), AfterValidator(_some_weight)]


def reward_models(scorers: Sequence[Any]) -> list[str]:
    """The trained reward models among scorers, an ensemble's members included, in order."""
    return [name for scorer in scorers for name in _reward_models(scorer)]


def _reward_models(scorer: Any) -> list[str]:
    if scorer.kind == "ensemble":
        return list(scorer.checkpoints)
    return [scorer.checkpoint] if scorer.kind == "model" else []
