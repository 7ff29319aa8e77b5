"""Metrics of the user: f(prompts, completions, references, **columns) -> float or dict[str, float]."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from configs.errors import UserError
from configs.schema.validation import KNOWN, PythonMetric
from rewards.protocol import Text
from rewards.python import UserFunction

EXPECTED = "f(prompts, completions, references, **columns) -> float or dict[str, float]"
NAME = re.compile(r"[A-Za-z][\w.@-]*")


class OwnMetric:
    """A function of the config's, called on all rows at once. Raises UserError for what can't be loaded."""

    def __init__(self, spec: PythonMetric) -> None:
        self.title = spec.title
        self.function = UserFunction(spec.function, "metric", EXPECTED, ("prompts", "completions", "references"))

    def __call__(self, prompts: Sequence[Text], completions: Sequence[str], references: Sequence[str], columns: Mapping[str, Sequence[Any]]) -> dict[str, float]:
        """Its numbers by name. Raises UserError with the function's name where it fails or returns anything but finite numbers."""
        given = {"prompts": prompts, "completions": completions, "references": references}
        return named_numbers(self.function.called, self.title, self.function.call(given, columns))


def named_numbers(called: str, title: str, returned: Any) -> dict[str, float]:
    """What a function returned, as finite numbers by name; a single number is called `title`."""
    found = returned if isinstance(returned, Mapping) else {title: returned}
    if not found:
        raise UserError(f"{called}: returned an empty mapping; expected a number, or a mapping of names to numbers")
    return {_checked_name(called, name): _number(called, name, value, single=found is not returned) for name, value in found.items()}


def _checked_name(called: str, name: Any) -> str:
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise UserError(f"{called}: names a metric {name!r}; expected a name of letters, digits, _ . @ and -, that begins with a letter")
    if name in KNOWN or name == "seconds":
        raise UserError(f"{called}: names a metric {name!r}, which is one of ours; give it another name")
    return name


def _number(called: str, name: str, value: Any, *, single: bool) -> float:
    what = "returned" if single else f"{name} is"
    if hasattr(value, "tolist"):  # of NumPy or torch
        value = value.tolist()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        length = f" of {len(value)}" if hasattr(value, "__len__") else ""
        raise UserError(f"{called}: {what} a {type(value).__name__}{length}; expected one number for all rows together, or a mapping of names to numbers")
    if not math.isfinite(value):
        raise UserError(f"{called}: {what} {value}; expected a finite number")
    return float(value)
