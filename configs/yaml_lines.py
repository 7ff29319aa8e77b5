"""YAML with the line of every value: safe, duplicate keys refused, `3e-6` read as a number.

PyYAML follows YAML 1.1, where `3e-6` is text, `no` is false, `010` is 8 and `12:30:00` is a number. Here the scalars are
those of YAML 1.2: true/false, null, decimal or 0x integers, decimal numbers with or without a point, and text.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from configs.errors import UserError

Key = tuple[str | int, ...]
"""Where a value stands: ("data", 0, "path")."""

MAX_VALUES = 100_000
"""More values than this come from anchors that multiply themselves, not from a person."""

NULL = re.compile(r"^(?:~|null|Null|NULL|)$")
BOOL = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
INT = re.compile(r"^[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F]+)$")
FLOAT = re.compile(r"^(?:[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$")


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012  (PyYAML's own attribute)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Merge keys (<<), each key once: PyYAML keeps every pair of every merge, which nine levels of nine merges make 387 million."""
        merges = any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value)
        super().flatten_mapping(node)
        if merges:
            node.value = list({key.value if isinstance(key, yaml.ScalarNode) else id(key): (key, value) for key, value in node.value}.values())


for _tag, _pattern, _first in (
    ("null", NULL, ["~", "n", "N", ""]),
    ("bool", BOOL, list("tTfF")),
    ("int", INT, list("-+0123456789")),
    ("float", FLOAT, list("-+.0123456789")),
    ("merge", re.compile(r"^<<$"), ["<"]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, _first)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes every text which either YAML 1.1 or the loader above would read as something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+.0123456789"))


class Document(NamedTuple):
    """A parsed file: its value, the 1-based line of every key path, and problems as (line, message)."""

    data: Any
    lines: dict[Key, int]
    problems: list[tuple[int, str]]


def read_text(path: Path | str) -> str:
    """The text of a config file. UserError where it is missing, a folder, unreadable or not UTF-8."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path}: this is a folder; expected a YAML file")
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        beside = sorted(p.name for p in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
        there = f"; in {path.parent} there are: {', '.join(beside[:10])}" if beside else ""
        raise UserError(f"{path}: no such file{there}") from None
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: this is not UTF-8 text (byte {error.start}); save the file as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def parse(text: str, name: str) -> Document:
    """Parse one YAML document; `name` stands for the file in errors. UserError where the YAML itself is broken."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
    except RecursionError:
        raise UserError(f"{name}: sections within sections without end; a config has a handful of levels") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise UserError(f"{name}:{line}: broken YAML: {_reason(error, text, line)}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{name}:{_line_of_bad_character(error, text)}: broken YAML: {error}".replace("\n", " ")) from None
    builder = _Builder(loader, name)
    try:
        data = builder.build(node, (), ()) if node is not None else None
    except RecursionError:
        raise UserError(f"{name}: sections within sections without end; a config has a handful of levels") from None
    return Document(data, builder.lines, builder.problems)


def _reason(error: yaml.MarkedYAMLError, text: str, line: int) -> str:
    """What PyYAML found, and the usual cause where the line shows it."""
    source = text.splitlines()[line - 1] if line <= len(text.splitlines()) else ""
    reason = " ".join(part for part in (error.context, error.problem) if part)
    if "\t" in source:
        return f"{reason}; the line holds a tab: indent with spaces"
    if "mapping values are not allowed" in reason:
        return f"{reason}; a text that holds ': ' needs quotes, and a key must be indented like those beside it"
    if "alias" in reason or "anchor" in reason or "cannot start any token" in reason:
        return f"{reason}; put the text in quotes"
    return reason


def _line_of_bad_character(error: yaml.YAMLError, text: str) -> int:
    position = getattr(error, "position", None)
    return text[:position].count("\n") + 1 if isinstance(position, int) else 1


class _Builder:
    """Turns a node tree into Python values and remembers lines and duplicate keys."""

    def __init__(self, loader: _Loader, name: str) -> None:
        self.loader, self.name = loader, name
        self.lines: dict[Key, int] = {}
        self.problems: list[tuple[int, str]] = []
        self.count = 0
        self.flattened: set[int] = set()

    def build(self, node: yaml.Node, at: Key, above: tuple[int, ...]) -> Any:
        line = node.start_mark.line + 1
        self.lines.setdefault(at, line)
        self.count += 1
        if id(node) in above or self.count > MAX_VALUES:
            raise UserError(f"{self.name}:{line}: an anchor (&name, *name) repeats itself without end; write the values out")
        if not isinstance(node, yaml.ScalarNode) and node.tag not in ("tag:yaml.org,2002:seq", "tag:yaml.org,2002:map"):
            self.problems.append((line, f"found the tag {node.tag}; expected a plain list or mapping"))
        above = (*above, id(node))
        if isinstance(node, yaml.SequenceNode):
            return [self.build(item, (*at, i), above) for i, item in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode):
            return self.mapping(node, at, above)
        return self.scalar(node, line)

    def mapping(self, node: yaml.MappingNode, at: Key, above: tuple[int, ...]) -> dict[str, Any]:
        first: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise UserError(f"{self.name}:{line}: a key must be text, found a list or a mapping (are braces or quotes missing?)")
            dotted = ".".join(map(str, (*at, key.value)))
            if key.value in first and key.value != "<<" and id(node) not in self.flattened:
                self.problems.append((line, f"{dotted}: this key stands twice (first in line {first[key.value]}); remove one"))
            first.setdefault(key.value, line)
        self.flattened.add(id(node))  # an alias brings the same node again, with merged keys before its own
        try:
            self.loader.flatten_mapping(node)
        except yaml.MarkedYAMLError as error:
            raise UserError(f"{self.name}:{node.start_mark.line + 1}: broken YAML: {error.problem}") from None
        values: dict[str, Any] = {}
        for key, value in node.value:
            self.lines[(*at, key.value)] = key.start_mark.line + 1
            values[key.value] = self.build(value, (*at, key.value), above)
        return values

    def scalar(self, node: yaml.Node, line: int) -> Any:
        kind, text = node.tag.removeprefix("tag:yaml.org,2002:"), node.value
        try:
            match kind:
                case "null":
                    return None
                case "bool":
                    return text.lower() == "true"
                case "int":
                    return int(text.replace("_", ""), 16 if "x" in text else 10)
                case "float":
                    plain = text.replace("_", "").lower()
                    return float(plain.replace(".inf", "inf").replace(".nan", "nan"))
                case "str":
                    return text
        except ValueError:
            pass
        self.problems.append((line, f"found {node.tag} {text!r}; expected plain text, a number, true, false or null"))
        return None


def to_yaml(data: Any) -> str:
    """YAML text of plain data, keys in their order; `parse` reads it back to the same values."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120, default_flow_style=False)
