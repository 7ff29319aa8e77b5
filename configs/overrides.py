"""Overrides from the command line (`train.learning_rate=1e-4`) and `${name}` references inside a config."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Any

from configs.errors import UserError
from configs.yaml_lines import Key, parse

REFERENCE = re.compile(r"\$(\$\{\w+\})|\$\{(\w+)\}")
"""`$${name}` stands for the text `${name}`."""
SECRET = re.compile(r"(?i)(?:token|secret|password|api_?key)$")
"""Ends the key of a value that no error may repeat."""


class Places:
    """Where every value came from: "chain.yaml:12" or "command line: seed=3"; an absent key has its section's place."""

    def __init__(self, name: str, lines: dict[Key, int]) -> None:
        self.name = name
        self._places = {key: f"{name}:{line}" for key, line in lines.items()}

    def __contains__(self, key: Key) -> bool:
        return key in self._places

    def of(self, key: Key) -> str:
        """The place of the key, or of the nearest section around it."""
        for end in range(len(key), 0, -1):
            if key[:end] in self._places:
                return self._places[key[:end]]
        return f"{self.name}:1"

    def fill(self, key: Key, place: str) -> None:
        """The value at `key`, which nobody wrote, comes from `place`."""
        self._places.setdefault(key, place)

    def replace(self, key: Key, place: str) -> None:
        """The value at `key`, with all below it, now comes from `place`."""
        self._places = {k: p for k, p in self._places.items() if k[: len(key)] != key}
        self._places[key] = place
        for end in range(1, len(key)):
            self._places.setdefault(key[:end], place)


def apply_overrides(data: dict[str, Any], overrides: Sequence[str], places: Places) -> list[str]:
    """Set `a.b.0.c=VALUE` in `data` (VALUE is YAML) and note the places; returns the problems found."""
    problems = []
    for override in overrides:
        key, equals, text = override.partition("=")
        place = f"command line: {key}=***" if SECRET.search(key) else f"command line: {override}"
        path: Key = tuple(int(part) if part.isdecimal() else part for part in key.strip().split("."))
        if not equals or not all(part != "" for part in path):
            problems.append(f"{place}: expected key=value, such as train.learning_rate=1e-4")
            continue
        if not text.strip():
            problems.append(f"{place}: the value is empty; write {key}=null for nothing or {key}=\"''\" for an empty text")
            continue
        try:
            document = parse(text, place)
            if document.problems:
                raise UserError(f"{place}: {document.problems[0][1]}")
            path = _set(data, path, document.data)
        except UserError as error:
            problems.append(str(error) if str(error).startswith("command line") else f"{place}: {error}")
            continue
        places.replace(path, place)
    return problems


def _set(data: dict[str, Any], path: Key, value: Any) -> Key:
    """Put `value` at `path`, making the sections on the way; returns the path with the keys as `data` has them.

    A bare source where a list is indexed becomes the list it stands for.
    """
    here: Any = data
    real: list[str | int] = []
    for depth, part in enumerate(path):
        last, dotted = depth == len(path) - 1, ".".join(map(str, path[: depth + 1]))
        if isinstance(here, list):
            if not isinstance(part, int) or part >= len(here):
                raise UserError(f"{dotted}: no such item; the list has {len(here)}, counted from 0")
        else:
            part = str(part)
        real.append(part)
        if last:
            here[part] = value
            break
        below = here.get(part) if isinstance(here, dict) else here[part]
        following = path[depth + 1]
        if isinstance(below, str | dict) and isinstance(following, int) and not (isinstance(below, dict) and str(following) in below):
            below = [below]  # `data: rows.jsonl` stands for [rows.jsonl]
        elif isinstance(below, str) and depth > 0 and following in ("path", "format", "columns", "weight", "limit", "hf_split", "revision"):
            below = {"path": below}  # [rows.jsonl] stands for [{path: rows.jsonl}]
        elif below is None and isinstance(following, int):
            raise UserError(f"{dotted}: there is no list to take item {following} of; give the whole list: {dotted}=[…]")
        elif below is None:
            below = {}
        elif not isinstance(below, dict | list):
            raise UserError(f"{dotted}: this is the value {below!r}, not a section that holds {following!r}")
        here[part] = below
        here = below
    return tuple(real)


def resolve_references(data: dict[str, Any], places: Places, settable: dict[str, str]) -> tuple[dict[str, Any], list[str]]:
    """Replace ${key} by the top-level value of that key.

    `settable` maps each top-level key that may be given to what it takes ("PATH", "VALUE"). Returns the new data and the problems.
    """
    resolver = _Resolver(data, places, settable)
    return resolver.walk(data, ()), resolver.problems


class _Resolver:
    def __init__(self, data: dict[str, Any], places: Places, settable: dict[str, str]) -> None:
        self.data, self.places, self.settable = data, places, settable
        self.problems: list[str] = []

    def walk(self, value: Any, at: Key, through: tuple[str, ...] = ()) -> Any:
        if isinstance(value, dict):
            return {key: self.walk(item, (*at, key), through) for key, item in value.items()}
        if isinstance(value, list):
            return [self.walk(item, (*at, i), through) for i, item in enumerate(value)]
        if not isinstance(value, str):
            return value
        whole = REFERENCE.fullmatch(value)
        if whole and whole[2]:
            return self.look_up(whole[2], at, through)
        return REFERENCE.sub(lambda m: m[1] or str(self.look_up(m[2], at, through)), value)

    def look_up(self, name: str, at: Key, through: tuple[str, ...]) -> Any:
        """The value of ${name}; a problem, and the reference as it stands, where it has none."""
        value = self.data.get(name)
        if name in through:
            self.report(at, f"${{{name}}} refers to itself through {' -> '.join((*through, name))}")
        elif isinstance(value, dict | list):
            self.report(at, f"${{{name}}} is a section; only top-level texts and numbers can be referred to")
        elif value is not None:
            return self.walk(value, at, (*through, name))
        elif name in self.settable:
            self.report(at, f"${{{name}}} has no value; give it on the command line: {name}={self.settable[name]}")
        else:
            close = difflib.get_close_matches(name, [k for k, v in self.data.items() if not isinstance(v, dict | list)], n=1)
            hint = f". Did you mean '${{{close[0]}}}'?" if close else f"; for the text itself write $${{{name}}}"
            self.report(at, f"${{{name}}} is no top-level key of this file{hint}")
        return f"${{{name}}}"

    def report(self, at: Key, message: str) -> None:
        problem = f"{self.places.of(at)}: {'.'.join(map(str, at))}: {message}"
        if problem not in self.problems:
            self.problems.append(problem)


def escape_references(value: Any) -> Any:
    """The inverse of `resolve_references` for values that hold no references: `${x}` is written as `$${x}`."""
    if isinstance(value, dict):
        return {key: escape_references(item) for key, item in value.items()}
    if isinstance(value, list):
        return [escape_references(item) for item in value]
    return re.sub(r"(\$\{\w+\})", r"$\1", value) if isinstance(value, str) else value
