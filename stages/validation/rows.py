"""Which held-out rows a model is asked to complete: the same at every evaluation and on any number of processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from configs.errors import UserError
from configs.schema.common import Source
from rewards.protocol import Text, scorer_prompt
from stages.data import Demonstration, Formatter, fingerprint
from stages.data.columns import columns_at
from stages.data.split import unit_hash


class Question(NamedTuple):
    """A held-out row as a prompt and the completion that it should get: its last assistant turn."""

    prompt_ids: list[int]
    prompt: Text
    reference: str
    columns: dict[str, Any]
    where: str


def question(formatter: Formatter, row: Demonstration) -> Question:
    """Raises UserError for a row whose last turn says nothing."""
    if not row.completion.strip():
        raise UserError(f"{row.where}: has no reference completion to compare with (its last assistant turn is blank, or only calls tools); fill it in or leave the row out")
    return Question(formatter.prompt_ids(row.prompt, row.tools), scorer_prompt(row.prompt), row.completion, {}, row.where)


def drawn(rows: Sequence[Demonstration], formatter: Formatter, *, count: int, seed: int, room: int) -> list[Question]:
    """At most `count` of the rows whose prompts have at most `room` tokens, in an order that depends on the seed and on what each row says."""
    order = sorted(range(len(rows)), key=lambda i: (unit_hash("evaluation", seed, fingerprint([rows[i]])), i))
    chosen: list[Question] = []
    for index in order:
        asked = question(formatter, rows[index])
        if len(asked.prompt_ids) <= room:
            chosen.append(asked)
        if len(chosen) == count:
            break
    return chosen


def with_columns(questions: Sequence[Question], sources: Sequence[Source]) -> list[Question]:
    """The questions with the further scalar columns of their rows. Raises UserError for a file that can't be read any more."""
    found = columns_at(sources, [asked.where for asked in questions])
    return [asked._replace(columns=found.get(asked.where, {})) for asked in questions]


def columns_of(questions: Sequence[Question]) -> dict[str, list[Any]]:
    """Further columns of the rows, as lists; None where a row has none of that name."""
    names = list(dict.fromkeys(name for asked in questions for name in asked.columns))
    return {name: [asked.columns.get(name) for asked in questions] for name in names}
