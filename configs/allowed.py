"""What may be allowed to have changed when an interrupted run is continued: groups of what a save depends on, or single fields of the config."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from configs.errors import UserError

if TYPE_CHECKING:
    from pydantic import BaseModel

GROUPS = {
    "data": "rows, their order, and the files they are read from",
    "tokenizer": "the tokenizer",
    "template": "the chat template",
    "schedule": "number of steps, batch size, learning rate and its decay",
    "processes": "number of processes; under ZeRO it can't change",
    "config": "any field of the config, the schedule's too",
    "split": "start from a model that was trained under another split",
}
"""Key of `allow_changed` -> what it allows."""


def fields_of(model: type[BaseModel]) -> list[str]:
    """Every dotted field of a config."""
    from configs.problems import all_paths

    return all_paths(model)


def unknown(keys: Iterable[str], fields: Sequence[str]) -> list[str]:
    """What is wrong with keys of `allow_changed`, each with what was probably meant."""
    known = [*GROUPS, *fields]
    out = []
    for key in keys:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
            hint = f". Did you mean {close[0]!r}?" if close else ""
            out.append(f"{key!r} can't be allowed to change; expected one of {', '.join(GROUPS)}, or a field such as train.learning_rate{hint}")
    return out


def with_allowed(cfg: Any, keys: Sequence[str]) -> Any:
    """A stage's config that allows these too, as `--allow-changed KEY` asks.

    Raises:
        UserError: a key that is none.
    """
    problems = unknown(keys, fields_of(type(cfg)))
    if problems:
        raise UserError("\n".join(f"--allow-changed: {problem}" for problem in problems))
    return cfg.model_copy(update={"allow_changed": list(dict.fromkeys([*cfg.allow_changed, *keys]))}) if keys else cfg


def chain_with_allowed(chain: Any, keys: Sequence[str]) -> Any:
    """A chain whose stages allow these too, each those that it has.

    Raises:
        UserError: a key that no stage of the chain has.
    """
    from configs.schema.chain import STAGES

    sections = {stage: getattr(chain, stage) for stage in STAGES if getattr(chain, stage) is not None}
    fields = {stage: fields_of(type(section)) for stage, section in sections.items()}
    if problems := unknown(keys, [field for own in fields.values() for field in own]):
        raise UserError("\n".join(f"--allow-changed: {problem}" for problem in problems))
    return chain.model_copy(update={stage: with_allowed(section, [key for key in keys if not unknown([key], fields[stage])]) for stage, section in sections.items()})


def add_option(parser: Any) -> None:
    """Add `--allow-changed KEY` to a parser."""
    parser.add_argument(
        "--allow-changed", action="append", default=[], metavar="KEY",
        help=f"continue an interrupted run although this has changed since: {', '.join(GROUPS)}, or a field such as train.learning_rate; can be repeated",
    )  # fmt: skip
