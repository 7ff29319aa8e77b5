"""The search space: which fields are tried, with which values, as text on the command line and as optuna's distributions."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

from configs.errors import UserError
from configs.problems import models_in, sections_at
from configs.schema.sweep import Range
from configs.yaml_lines import parse

if TYPE_CHECKING:
    from pydantic import BaseModel

RANGE = re.compile(r"^(?P<low>[^,:\s]+?)\.\.(?P<high>[^,:\s]+?)(?P<log>:log)?(?::step=(?P<step>[^:\s]+))?$")
FORMS = "KEY=1e-5..1e-3:log, KEY=0..0.3, KEY=8..64:step=8 or KEY=4,8,16"
WIDTH = 10.0  # the default range of a learning rate is the config's divided and multiplied by this


@dataclass(frozen=True)
class Field:
    """One field that is swept: its key, and its values as a range (whole numbers where `whole`) or a list."""

    key: str
    values: Range | tuple[Any, ...]
    whole: bool = False

    @property
    def labels(self) -> list[Any]:
        """The values of a list as the study keeps them: scalars as they are, lists and mappings as JSON."""
        assert not isinstance(self.values, Range)
        return [json.dumps(value) if isinstance(value, list | dict) else value for value in self.values]

    def value_of(self, label: Any) -> Any:
        """The config's value for what the study keeps."""
        if isinstance(self.values, Range):
            return self._short(label) if isinstance(label, float) else label
        for value, known in zip(self.values, self.labels, strict=True):
            if known == label and isinstance(known, bool) == isinstance(label, bool):
                return value
        raise AssertionError(f"{label!r} is none of {self.labels}")

    def _short(self, label: float) -> float:
        """A drawn number in four digits, as a person would write it; one that a person wrote stays as it is."""
        assert isinstance(self.values, Range)
        if len(repr(label).partition("e")[0].strip("0.").replace(".", "")) <= 8:
            return label
        return min(max(float(f"{label:.4g}"), float(self.values.low)), float(self.values.high))

    def label_of(self, value: Any) -> Any | None:
        """What the study would keep for a config's value, as a list of one; None where the space does not hold it."""
        if isinstance(self.values, Range):
            if isinstance(value, bool) or not isinstance(value, int | float) or not self.values.low <= value <= self.values.high:
                return None
            steps = (value - self.values.low) / self.values.step if self.values.step else 0.0
            return None if abs(steps - round(steps)) > 1e-9 else [int(value) if self.whole else float(value)]
        return next(([label] for own, label in zip(self.values, self.labels, strict=True) if own == value), None)

    def every(self) -> list[Any] | None:
        """Every label; None of a range without steps."""
        if not isinstance(self.values, Range):
            return self.labels
        step = self.values.step or (1 if self.whole and not self.values.log else None)
        if step is None:
            return None
        count = math.floor((self.values.high - self.values.low) / step + 1e-9) + 1
        return [self.values.low + number * step for number in range(count)]

    def ends(self) -> list[Any]:
        """Values that must be allowed for all of them to be: both ends of a range, or the list."""
        return [self.values.low, self.values.high] if isinstance(self.values, Range) else list(self.values)

    def __str__(self) -> str:
        if not isinstance(self.values, Range):
            return ", ".join(str(label) for label in self.labels)
        extra = ", log-uniform" if self.values.log else f" in steps of {self.values.step:g}" if self.values.step else ", uniform"
        return f"{self.values.low:g} to {self.values.high:g}{extra}"


def from_text(words: Sequence[str]) -> dict[str, Range | list[Any]]:
    """The space of `--space KEY=LOW..HIGH[:log|:step=S]` and `--space KEY=A,B,C`, values in YAML.

    Raises:
        UserError: with every word that is neither.
    """
    found: dict[str, Range | list[Any]] = {}
    problems = []
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key.strip() or not text.strip():
            problems.append(f"--space {word}: expected {FORMS}")
            continue
        try:
            found[key.strip()] = _values(text.strip(), word)
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))
    return found


def _values(text: str, word: str) -> Range | list[Any]:
    match = RANGE.match(text)
    if match is None:
        listed = parse(text if text.startswith("[") else f"[{text}]", f"--space {word}")
        if listed.problems or not listed.data:
            raise UserError(f"--space {word}: expected {FORMS}")
        return list(listed.data)
    numbers = {name: parse(match[name], word).data for name in ("low", "high", "step") if match[name] is not None}
    if not all(isinstance(number, int | float) and not isinstance(number, bool) for number in numbers.values()):
        raise UserError(f"--space {word}: the ends and the step of a range are numbers; expected {FORMS}")
    try:
        return Range(log=match["log"] is not None, **numbers)
    except ValueError as error:
        raise UserError(f"--space {word}: {str(error).partition('Value error, ')[2].partition(' [type')[0] or error}") from error


def fields_of(space: Mapping[str, Range | list[Any]], model: type[BaseModel]) -> list[Field]:
    """The fields of a space, whole numbers told by the schema.

    Raises:
        UserError: a list without values, or with a value twice; a whole-number field with ends or a step that are not whole.
    """
    fields, problems = [], []
    for key, values in space.items():
        if not isinstance(values, Range):
            field = Field(key, tuple(values))
            if not values or any(field.labels.count(label) > 1 for label in field.labels):
                problems.append(f"space: {key}: {'a value stands twice in' if values else 'found an empty list; expected'} the list of values")
            fields.append(field)
            continue
        numbers = [values.low, values.high, *([] if values.step is None else [values.step])]
        integral = all(float(number).is_integer() for number in numbers)
        whole = _is_whole(key, model, all(isinstance(number, int) for number in numbers))
        if whole and not integral:
            problems.append(f"space: {key}: found {values.low:g} to {values.high:g}; expected whole numbers, for the field takes no others")
        fields.append(Field(key, values, whole))
    if problems:
        raise UserError("\n".join(problems))
    return fields


def _is_whole(key: str, model: type[BaseModel], written_so: bool) -> bool:
    """Whether a field takes whole numbers only; of a field that the schema does not know (under `trainer`), whether its range is written so."""
    *above, last = key.split(".")
    path = tuple(int(part) if part.isdecimal() else part for part in above)
    kinds = {kind for section in sections_at(model, path) for name, field in section.model_fields.items() if (field.alias or name) == last for kind in _kinds(field.annotation)}
    return int in kinds and float not in kinds if kinds & {int, float} else written_so


def _kinds(annotation: Any) -> list[Any]:
    arguments = get_args(annotation)
    return [annotation] if not arguments or models_in(annotation) else [kind for inner in arguments for kind in _kinds(inner)]


def override(key: str, value: Any) -> str:
    """`key=value` as the command line takes it."""
    return f"{key}={json.dumps(value)}"


def combinations(fields: Sequence[Field]) -> list[dict[str, Any]]:
    """Every combination of labels, in order.

    Raises:
        UserError: a range that has no steps.
    """
    endless = [field.key for field in fields if field.every() is None]
    if endless:
        raise UserError(f"space: a grid needs steps or a list of values for {', '.join(endless)}, such as {endless[0]}=8..64:step=8; or take --sampler random")
    return [dict(zip([field.key for field in fields], labels, strict=True)) for labels in itertools.product(*(field.every() or [] for field in fields))]


def size(fields: Sequence[Field]) -> int | None:
    """Combinations in all; None where a range has no end of them."""
    counts = [field.every() for field in fields]
    return None if any(count is None for count in counts) else math.prod(len(count) for count in counts if count is not None)
