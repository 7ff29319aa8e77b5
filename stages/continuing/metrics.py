"""The metrics that `evaluation.metrics` names, before and after, on held-out rows of new and old data: the completions that the run's evaluations would compare."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from configs.errors import UserError
from configs.schema import SFTStage
from configs.schema.common import Source
from configs.schema.validation import KNOWN, PREFIX, WITHOUT_COMPLETIONS, Validation
from stages import data
from stages.continuing import row_sums
from stages.continuing.figures import verdict
from stages.continuing.row_sums import RowSums
from stages.tokens import ModelTokens
from stages.training import watchdog
from stages.training.ranks import from_rank_0
from stages.validation.completions import complete
from stages.validation.held_out import HeldOut, Part, questions_of
from stages.validation.labels import Choice, choices, label_logprobs, labels_of


@dataclass(frozen=True)
class Asked:
    """What one set of held-out rows is asked. The groups are the prompts of questions and of choices, one number per row."""

    part: Part
    labels: list[str]
    question_groups: list[int]
    choice_groups: list[int]
    own: bool = True  # whether the user's functions measure it too


class Answers(NamedTuple):
    """What a model says to that: a completion of each question, and the number of the likeliest label of each choice."""

    completions: list[str]
    predicted: list[int]


def ask(cfg: SFTStage, tokens: ModelTokens, parts: data.Splits[data.Demonstration], sources: Sequence[Source], limit: int, positions: int | None) -> tuple[Asked, str]:
    """What the validation part is asked, and why it is not told apart by labels ("" where it is, or nobody wants it).

    Labels are those of the config, else those of this data's own training part: rows that were trained on earlier may have others than the new ones.
    """
    rows, why, labels = parts.validation, "", list[str]()
    if WITHOUT_COMPLETIONS in cfg.evaluation.metrics:
        try:
            labels = labels_of(cfg.evaluation.labels, parts.train)
        except UserError as error:
            why = str(error).splitlines()[0]
    groups = _groups(rows)
    questions = questions_of(cfg, tokens, rows, limit, positions, sources)
    found: list[Choice] = []
    places: list[int] = []
    for row in rows if labels else []:
        for choice in choices(tokens.formatter, [row], labels, limit, strict=False):
            found.append(choice)
            places.append(groups[row.where])
    if found and all(choice.truth is None for choice in found):
        found, why = [], f"none of its rows says one of the labels {', '.join(map(repr, labels))}"
    return Asked(Part(questions, found), labels, [groups[asked.where] for asked in questions], places if found else []), why


def _groups(rows: Sequence[data.Demonstration]) -> dict[str, int]:
    """A number for each prompt, by where its rows stand."""
    known: dict[str, int] = {}
    return {row.where: known.setdefault(data.group_key(row.prompt), len(known)) for row in rows}


def without_own(cfg: SFTStage, tokens: ModelTokens, asked: Asked) -> tuple[Asked, str]:
    """Rows that the user's functions can't measure are left to the metrics of ours; and why that is. A collective."""
    if not cfg.evaluation.own or not asked.part.questions:
        return asked, ""
    try:
        from_rank_0("trying out evaluation.metrics", lambda: _measure(cfg, tokens, asked).compare(asked.part.questions, [row.reference for row in asked.part.questions]) and None)
    except UserError as error:
        return replace(asked, own=False), str(error).splitlines()[0]
    return asked, ""


def _measure(cfg: SFTStage, tokens: ModelTokens, asked: Asked) -> HeldOut:
    """The same measure as that of the run's evaluations."""
    metrics = [metric for metric in cfg.evaluation.metrics if asked.own or isinstance(metric, str)]
    return HeldOut(cfg.evaluation.model_copy(update={"metrics": metrics}), tokens, asked.labels, asked.part, Part([], []), 1)


def complete_all(trainer: Any, tokens: ModelTokens, evaluation: Validation, asked: Asked) -> list[str]:
    """The completions of a set's questions. A collective; under ZeRO-3 the weights are whole meanwhile."""
    if evaluation.generate is None or not asked.part.questions:
        return []
    with watchdog.during("eval"):
        return complete(trainer, tokens, asked.part.questions, evaluation.generate)


def tell_apart(trainer: Any, tokens: ModelTokens, asked: Asked) -> list[int]:
    """The likeliest label of each choice. A collective of forward passes."""
    if not asked.part.choices:
        return []
    with watchdog.during("eval"):
        return [int(number) for number in label_logprobs(trainer, asked.part.choices, tokens.pad_id).argmax(dim=1)]


def compared(cfg: SFTStage, tokens: ModelTokens, asked: Asked, before: Answers, after: Answers) -> dict[str, Any]:
    """Metric -> {"before", "after", "difference", "low", "high", "rows", "verdict"}, JSON; on one process.

    low and high are None where no interval can be given: with one prompt, and of functions of the user's, which are called on all rows at once. The
    verdict is "" where nobody said which way is better. Raises UserError where such a function fails.
    """
    found: dict[str, Any] = {}
    if asked.part.choices:
        truth = [choice.truth for choice in asked.part.choices]
        was, now = (row_sums.of_labels(answers.predicted, truth, len(asked.labels)) for answers in (before, after))
        found |= _entries(cfg, row_sums.values(was), row_sums.values(now), was, now, asked.choice_groups)
    if asked.part.questions and before.completions:
        questions, measure = asked.part.questions, _measure(cfg, tokens, asked)
        names, references = [metric for metric in cfg.evaluation.metrics if isinstance(metric, str)], [row.reference for row in questions]
        was, now = (row_sums.of_completions(names, answers.completions, references) for answers in (before, after))
        points = [measure.compare(questions, answers.completions) for answers in (before, after)]
        found |= _entries(cfg, points[0], points[1], was, now, asked.question_groups)
    return found


def _entries(cfg: SFTStage, before: dict[str, float], after: dict[str, float], was: dict[str, RowSums], now: dict[str, RowSums], groups: list[int]) -> dict[str, Any]:
    return {name: _entry(cfg, name, before[name], after[name], row_sums.interval(was[name], now[name], groups, seed=cfg.seed) if name in was else None, len(groups)) for name in before if name in after}


def _entry(cfg: SFTStage, name: str, before: float, after: float, interval: tuple[float, float] | None, rows: int) -> dict[str, Any]:
    low, high = interval or (None, None)
    higher = cfg.evaluation.higher_is_better if cfg.evaluation.metric == PREFIX + name else KNOWN.get(name)
    told = verdict(low, high, higher=higher) if interval and higher is not None else "" if name not in KNOWN else verdict(None, None)
    return {"before": before, "after": after, "difference": after - before, "low": low, "high": high, "rows": rows, "verdict": told}
