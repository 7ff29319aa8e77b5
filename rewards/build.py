"""From the `scorers:` section of a config, or a short string on the command line, to scorers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from configs.errors import UserError
from rewards.combine import Weighted, WeightedSum
from rewards.ensemble import RewardEnsemble
from rewards.protocol import Scorer
from rewards.python import PythonFunction
from rewards.rules import Keyword, Length, Regex, Repetition

if TYPE_CHECKING:
    from configs.schema.scorers import ScorerSpec

SPECS = "length:WORDS, repetition:NGRAM, regex:PATTERN, keyword:A,B, package.module:function, or a registry name such as reward/demo@1"


def build_scorers(specs: Sequence[ScorerSpec], load_checkpoint: Callable[[str], Scorer]) -> WeightedSum:
    """The weighted sum of the scorers that a config names.

    load_checkpoint(ref) gives the scorer of a trained reward model (a RewardModelScorer); it is called for `kind: model` and for every member of
    a `kind: ensemble`.
    Raises UserError for what cannot be built.
    """
    return WeightedSum([Weighted(_build(spec, load_checkpoint), spec.weight) for spec in specs])


def _build(spec: Any, load_checkpoint: Callable[[str], Scorer]) -> Scorer:
    if spec.kind == "model":
        return load_checkpoint(spec.checkpoint)
    if spec.kind == "ensemble":
        return RewardEnsemble([load_checkpoint(name) for name in spec.checkpoints], how=spec.combine, spread_coef=spec.spread_coef)
    if spec.kind == "length":
        return Length(spec.target)
    if spec.kind == "repetition":
        return Repetition(spec.ngram)
    if spec.kind == "regex":
        return Regex(spec.pattern)
    if spec.kind == "keyword":
        return Keyword(spec.words)
    assert spec.kind == "python", f"the schema allows a kind that nobody builds: {spec.kind}"
    return PythonFunction(spec.function)


def parse_spec(text: str) -> dict[str, Any]:
    """A scorer written as one string -> the mapping that a config would hold. Raises UserError for what it cannot be."""
    kind, colon, rest = text.partition(":")
    if colon and kind == "length":
        return {"kind": "length", "target": _integer(text, rest)}
    if colon and kind == "repetition":
        return {"kind": "repetition", "ngram": _integer(text, rest)}
    if colon and kind == "regex" and rest:
        return {"kind": "regex", "pattern": rest}
    if colon and kind == "keyword" and rest:
        return {"kind": "keyword", "words": [word.strip() for word in rest.split(",") if word.strip()]}
    if "/" in text and not colon:
        return {"kind": "model", "checkpoint": text}
    if "/" not in kind and colon and all(part.isidentifier() for part in [*kind.split("."), rest]):
        return {"kind": "python", "function": text}
    if text.startswith("reward/"):  # reward/demo@best:accuracy
        return {"kind": "model", "checkpoint": text}
    raise UserError(f"scorer {text!r} is not understood; expected {SPECS}")


def _integer(text: str, value: str) -> int:
    if not value.isdecimal() or int(value) < 1:
        raise UserError(f"scorer {text!r}: {value!r} is not a whole number above 0; expected {SPECS}")
    return int(value)
