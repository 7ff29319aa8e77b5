"""The figures of one model, and the comparison of two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from configs.schema import EvalConfig
from rewards.combine import Scores, WeightedSum
from rewards.protocol import scorer_prompt
from stages.data import Prompt
from stages.evaluation.likelihood import completion_logprobs, same_vocabulary, text_perplexity
from stages.evaluation.statistics import kl_of_completions, mean_and_se, win_rate
from stages.evaluation.subject import Completions, Subject, complete


@dataclass(frozen=True)
class Measured:
    """A model's completions, their scores, and the figures that need no other model's scores."""

    completions: Completions
    scores: Scores
    figures: dict[str, Any]


def measure(subject: Subject, reference: Subject, prompts: Sequence[Prompt], scorer: WeightedSum, cfg: EvalConfig) -> Measured:
    """Sample, score, and compare with the reference."""
    written = complete(subject, prompts, cfg)
    scores = score(subject, written, prompts, scorer)
    lengths = [len(ids) for ids in written.completion_ids]
    ended = [any(token in subject.tokens.eos_ids for token in ids) for ids in written.completion_ids]
    length = mean_and_se(lengths, written.groups)
    text = cfg.plain_text
    figures = {
        "score": mean_and_se(scores.total, written.groups)._asdict(),
        "parts": {name: _part(values, written.groups) for name, values in scores.parts.items()},
        "kl": kl_to_reference(subject, reference, written, cfg.sampling.temperature),
        "length": length.mean,
        "length_se": length.se,
        "eos_rate": float(np.mean(ended)),
        "perplexity": text_perplexity(subject.model, subject.tokens.tokenizer, text, pad_id=subject.tokens.pad_id) if text else None,
        "n": len(lengths),
        "prompts": len(prompts),
    }
    return Measured(written, scores, figures)


def score(subject: Subject, written: Completions, prompts: Sequence[Prompt], scorer: WeightedSum) -> Scores:
    """Scores of completions; a reward model with the same tokenizer and template reads the sampled ids."""
    rows = [prompts[i] for i in written.groups]
    names = {name for row in rows for name in row.columns}
    columns: dict[str, Any] = {name: [row.columns.get(name) for row in rows] for name in sorted(names)}
    columns["finished"] = written.finished
    return scorer.score(
        [scorer_prompt(row.prompt) for row in rows], written.texts, token_key=subject.tokens.key,
        prompt_ids=written.prompt_ids, completion_ids=written.completion_ids, **columns,
    )  # fmt: skip


def _part(values: Sequence[float | None], groups: Sequence[int]) -> dict[str, Any]:
    """Mean of one scorer over the completions it applies to."""
    known = [(value, group) for value, group in zip(values, groups, strict=True) if value is not None]
    if not known:
        return {"mean": None, "se": None, "n": 0}
    estimate = mean_and_se([value for value, _ in known], [group for _, group in known])
    return {**estimate._asdict(), "n": len(known)}


def kl_to_reference(subject: Subject, reference: Subject, written: Completions, temperature: float) -> dict[str, float | None] | None:
    """KL(model || reference) summed over a completion, nats, at the sampling temperature; None with another vocabulary."""
    if not same_vocabulary(subject.reader.vocabulary, reference.reader.vocabulary):
        return None
    if subject.reader is reference.reader:
        return {"k1": 0.0, "k1_se": 0.0, "k3": 0.0, "k3_se": 0.0}
    ids = (written.prompt_ids, written.completion_ids)
    ours, mask = completion_logprobs(subject.model, *ids, temperature=temperature, pad_id=subject.tokens.pad_id)
    theirs, _ = completion_logprobs(reference.model, *ids, temperature=temperature, pad_id=reference.tokens.pad_id)
    k1, k3 = (mean_and_se(values, written.groups) for values in kl_of_completions(ours, theirs, mask))
    return {"k1": k1.mean, "k1_se": k1.se, "k3": k3.mean, "k3_se": k3.se}


def compare(ours: Measured, theirs: Measured, seed: int) -> dict[str, Any]:
    """Win rate of one model against another on the weighted sum of the scorers."""
    result = win_rate(ours.scores.total, ours.completions.groups, theirs.scores.total, theirs.completions.groups, seed=seed)
    return {"win_rate": result.rate, "win_rate_ci": [result.low, result.high]}
