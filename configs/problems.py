"""What pydantic found wrong, as lines for a person: place, field, found, expected, did you mean."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from configs.overrides import Places
from configs.schema.chain import SHARED, STAGES
from configs.yaml_lines import Key

EXPECTED = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "path_type": "a path (text)",
    "list_type": "a list",
    "dict_type": "a mapping (key: value)",
    "model_type": "a section (key: value)",
    "model_attributes_type": "a section (key: value)",
}
"""Pydantic's error type -> what was expected."""

TAGS = ("kind", "method")
"""Keys whose value says which member of a union a section is."""

FILLED_FROM = {"init_from": "base", "name": "name", "output": "output", "scorers": "reward"}
"""Key that a chain fills into a stage's section -> the top-level key it comes from; SHARED keys keep their name."""


def describe(errors: Iterable[ErrorDetails], model: type[BaseModel], data: dict[str, Any], places: Places) -> list[str]:
    """One line per problem. `data` is what was validated, with what a chain fills into its sections."""
    found: dict[Key, list[tuple[str, str]]] = {}  # path -> (what is wrong, what was expected)
    deeper: set[Key] = set()
    for error in errors:
        path, through_union = _path(error, data)
        if "sft" in model.model_fields:
            path = _where_it_was_written(path, places)
        if through_union is not None and len(path) > len(through_union):
            deeper.add(through_union)
        entry = _sentence(error, path, model)
        if entry not in found.setdefault(path, []):
            found[path].append(entry)
    lines = []
    for path, entries in found.items():
        if path in deeper:
            continue  # the union's other member fits better and reports what is wrong inside
        message, hint = _merge(entries)
        lines.append(_line(path, message, hint, places))
    return list(dict.fromkeys(lines))


def _line(path: Key, message: str, hint: str, places: Places) -> str:
    """`place: field: message`; a relation between fields stands at the first field it names."""
    at = path
    named = re.match(r"[a-z_]+(?:\.[a-z_]+)*", message)
    if named and (*path, *named[0].split(".")) in places:
        at = (*path, *named[0].split("."))
    field = ".".join(map(str, path))
    return f"{places.of(at)}: {field + ': ' if field else ''}{message}{hint}"


def _merge(entries: list[tuple[str, str]]) -> tuple[str, str]:
    """Problems of one field, such as those of a union's members, as one."""
    messages = list(dict.fromkeys(message for message, _ in entries))
    marker = "; expected "
    if len(messages) > 1 and len({message.partition(marker)[0] for message in messages}) == 1:
        start = messages[0].partition(marker)[0]
        messages = [start + marker + " or ".join(message.partition(marker)[2] for message in messages)]
    return " and ".join(messages), next((hint for _, hint in entries if hint), "")


def _path(error: ErrorDetails, data: Any) -> tuple[Key, Key | None]:
    """Pydantic's location without the names of union members, and the path of the union if it went through one."""
    path: list[str | int] = []
    union: Key | None = None
    here, last = data, error["loc"][-1] if error["loc"] else None
    for part in error["loc"]:
        if isinstance(here, dict):
            names_a_member = part not in here and (any(here.get(tag) == part for tag in TAGS) or (part != last or error["type"] != "missing"))
        elif isinstance(here, list):
            names_a_member = not isinstance(part, int)
        elif isinstance(part, int) and part == 0:
            continue  # a bare source stands for a list of one
        else:
            names_a_member = error["type"] != "missing"
        if names_a_member:
            union = tuple(path)
            continue
        path.append(part)
        if isinstance(here, dict):
            here = here.get(part)
        elif isinstance(here, list) and isinstance(part, int) and part < len(here):
            here = here[part]
        else:
            here = None
    return tuple(path), union


def _where_it_was_written(path: Key, places: Places) -> Key:
    """In a chain, the top-level key that a stage's section got its value from, unless the section has its own."""
    if len(path) < 2 or path[0] not in STAGES or path[:2] in places:
        return path
    key = str(path[1])
    if key in SHARED:
        return path[1:]
    if key in FILLED_FROM and (FILLED_FROM[key],) in places:
        return (FILLED_FROM[key],)
    return path


def _sentence(error: ErrorDetails, path: Key, model: type[BaseModel]) -> tuple[str, str]:
    """What is wrong with a field, and a hint that ends the line."""
    kind, context = error["type"], error.get("ctx", {})
    found = show(error.get("input"))
    if kind == "missing":
        return f"missing{_meaning(path, model)}", ""
    if kind == "extra_forbidden":
        return _unknown(path, model, error["loc"])
    if kind == "value_error":
        return str(context.get("error", error["msg"])), ""
    if kind == "literal_error":
        return f"found {found}; expected {context['expected']}", did_you_mean(error.get("input"), re.findall(r"'([^']*)'", context["expected"]))
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        return _member(kind, context, path, model)
    expected = EXPECTED.get(kind) or _limit(kind, context) or error["msg"]
    quotes = "; put quotes around it" if kind in ("string_type", "path_type") and isinstance(error.get("input"), int | float) else ""
    return f"found {found}; expected {expected}", quotes


def _limit(kind: str, context: Mapping[str, Any]) -> str | None:
    match kind:
        case "greater_than":
            return f"a number above {context['gt']:g}"
        case "greater_than_equal":
            return f"a number of at least {context['ge']:g}"
        case "less_than":
            return f"a number below {context['lt']:g}"
        case "less_than_equal":
            return f"a number of at most {context['le']:g}"
        case "too_short":
            return f"at least {context['min_length']} item"
        case "string_pattern_mismatch" if "a-z0-9" in context["pattern"]:
            return "a name of a-z, 0-9, dot, dash and underscore, at most 64 characters, that starts with a letter or digit"
        case "string_pattern_mismatch" if "evaluation/" in context["pattern"]:
            return "the name of a metric, such as evaluation/heldout_score or evaluation/win_rate, with a minus before it where lower is better"
        case "string_pattern_mismatch":
            return "package.module:function"
    return None


def _member(kind: str, context: Mapping[str, Any], path: Key, model: type[BaseModel]) -> tuple[str, str]:
    tag = str(context["discriminator"]).strip("'")
    known = [name for section in sections_at(model, path) if tag in section.model_fields for name in get_args(section.model_fields[tag].annotation)]
    options = ", ".join(known)
    if kind == "union_tag_not_found":
        return f"`{tag}` is missing; expected one of {options}", ""
    return f"{tag} is {context.get('tag')!r}; expected one of {options}", did_you_mean(context.get("tag"), known)


def show(value: Any) -> str:
    """A value as the file writes it, shortened."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, dict):
        return f"a mapping of {len(value)} key{'s' * (len(value) > 1)}" if value else "an empty mapping"
    if isinstance(value, list):
        return f"a list of {len(value)}" if value else "an empty list"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…" + text[0]


def did_you_mean(value: Any, known: Iterable[str]) -> str:
    """ ". Did you mean 'x'?" or nothing."""
    close = difflib.get_close_matches(str(value), list(known), n=1, cutoff=0.6)
    return f". Did you mean {close[0]!r}?" if close else ""


def _unknown(path: Key, model: type[BaseModel], loc: Key) -> tuple[str, str]:
    """An unknown key: the near ones of its section, else the same name elsewhere in the schema. `loc` names a union's member."""
    key, sections = str(path[-1]), sections_at(model, path[:-1])
    of_this_kind = [s for s in sections for tag in TAGS if tag in s.model_fields and set(get_args(s.model_fields[tag].annotation)) & set(loc)]
    sections = of_this_kind or sections
    known = list(dict.fromkeys(name for section in sections for name in keys(section)))
    hint = did_you_mean(key, known)
    if not hint:
        elsewhere = [name for name in all_paths(model) if name.rpartition(".")[2] == key and name != ".".join(map(str, path))]
        stage = str(path[0])
        elsewhere.sort(key=lambda name: not name.startswith(stage + "."))
        hint = f". Did you mean {elsewhere[0]!r}?" if elsewhere else ""
    options = f"; expected one of {', '.join(known)}" if known and (not hint or len(known) <= 10) else ""
    return f"unknown key{options}", hint


def _meaning(path: Key, model: type[BaseModel]) -> str:
    for section in sections_at(model, path[:-1]):
        for name, field in section.model_fields.items():
            if (field.alias or name) == path[-1] and field.description:
                return f" ({field.description.rstrip('.')})"
    return ""


def keys(model: type[BaseModel]) -> list[str]:
    """The keys of a section as a file writes them."""
    return [field.alias or name for name, field in model.model_fields.items()]


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """The schema models inside a type such as `list[A | B] | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in models_in(part)]


def _field(model: type[BaseModel], key: str) -> FieldInfo | None:
    return next((field for name, field in model.model_fields.items() if (field.alias or name) == key), None)


def sections_at(model: type[BaseModel], path: Key) -> list[type[BaseModel]]:
    """The models that may stand at a path; list indexes and the keys of free mappings lead to the item's model."""
    here = [model]
    for part in path:
        below = [m for section in here if (field := _field(section, str(part))) for m in models_in(field.annotation)]
        known_elsewhere = not below and all(_field(section, str(part)) is None for section in here)
        here = here if known_elsewhere else below
    return here


def all_paths(model: type[BaseModel], before: str = "") -> list[str]:
    """Every dotted key below a model."""
    paths = []
    for name, field in model.model_fields.items():
        dotted = f"{before}{field.alias or name}"
        paths.append(dotted)
        for section in models_in(field.annotation):
            paths.extend(all_paths(section, dotted + "."))
    return paths
