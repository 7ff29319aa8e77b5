"""What scores a completion: the trained reward model, rules, or the user's own function."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from configs.schema.common import Strict


class _Weighted(Strict):
    weight: float = Field(default=1.0, description="Factor of this scorer in the weighted sum.")


class ModelScorer(_Weighted):
    """A trained reward model."""

    kind: Literal["model"]
    checkpoint: str = Field(description="A registry name such as reward/demo@1.")


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
    ModelScorer | LengthScorer | RepetitionScorer | RegexScorer | KeywordScorer | PythonScorer, Field(discriminator="kind")
]
