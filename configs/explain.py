"""What a config key means: type, unit, default, allowed values, meaning; and the JSON schema for editors."""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Container
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from configs.errors import UserError
from configs.load import MODELS, model_of
from configs.problems import TAGS, models_in, show
from configs.schema.chain import SHARED, STAGES

FILLED = (*SHARED, "name", "output", "init_from", "scorers")
"""Keys of a stage's section that a chain fills in."""

UNITS = (
    (r"per token, per nat", "per token, per nat"),
    (r"\bper nat\b", "per nat"),
    (r"\bnats\b", "nats"),
    (r"^Tokens\b", "tokens"),
    (r"^Words\b", "words"),
    (r"^(Optimizer steps|Stop after this many optimizer steps)", "optimizer steps"),
    (r"^(Iterations|First iterations|Rollouts)", "iterations"),
    (r"^Passes", "passes"),
    (r"^Rows \(or pairs\)", "rows (or pairs)"),
    (r"^Completions per prompt", "completions per prompt"),
    (r"^Completions", "completions"),
    (r"^Prompts|^Use the first so many prompts", "prompts"),
    (r"^Samples", "samples"),
    (r"^Number of processes", "processes"),
    (r"^(Assumed s|S)hare\b", "share (0 to 1)"),
    (r"^Stop after this many evaluations", "evaluations"),
    (r"^Read at most this many rows", "rows"),
    (r"^Discount per token", "per token"),
)
"""What a description starts with -> the unit of the number."""


class Entry(NamedTuple):
    """One key of one kind of config."""

    kind: str
    path: str
    owner: type[BaseModel]
    field: FieldInfo


def explain(key: str) -> str:
    """Everything about a key such as `ppo.kl_coef`, `train.batch_size`, `kl_coef`, or a kind or section with its keys.

    A key that stands in several places is explained for each. UserError with suggestions for an unknown one.
    """
    wanted = [part for part in key.strip().split(".") if not part.isdecimal()]
    entries = [entry for kind in MODELS for entry in _entries(kind)]
    own = any(wanted == [entry.kind, *entry.path.split(".")] for entry in entries)
    if wanted[:1] == ["chain"] and len(wanted) > 2 and wanted[1] in STAGES and not own:
        wanted = wanted[1:]  # a chain's section is explained as the stage it is
    if len(wanted) == 1 and wanted[0] in MODELS:
        return _list_of_keys(wanted[0])
    found = [entry for entry in entries if wanted == [entry.kind, *entry.path.split(".")]]
    found = found or [entry for entry in entries if entry.path.split(".")[-len(wanted) :] == wanted]
    found = found or [entry for entry in entries if entry.kind == wanted[0] and entry.path.split(".")[-len(wanted) + 1 :] == wanted[1:]]
    if not found:
        raise UserError(_unknown(key, wanted, entries))
    groups: dict[tuple[Any, ...], list[Entry]] = {}
    for entry in found:
        same: tuple[Any, ...] = (entry.path, repr(entry.field), entry.field.description)
        if _tag_of(entry.owner) == entry.path.rpartition(".")[2]:
            same = (entry.path,)  # one key; each of its values is a model
        groups.setdefault(same, []).append(entry)
    return "\n\n".join(_block(group) for group in groups.values())


def _unknown(key: str, wanted: list[str], entries: list[Entry]) -> str:
    names = {entry.path for entry in entries} | {f"{entry.kind}.{entry.path}" for entry in entries}
    names |= {entry.path.rpartition(".")[2] for entry in entries}
    close = difflib.get_close_matches(".".join(wanted), names, n=3, cutoff=0.6)
    close = close or difflib.get_close_matches(wanted[-1] if wanted else "", names, n=3, cutoff=0.6)
    close = [name for i, name in enumerate(close) if name.rpartition(".")[2] not in [other.rpartition(".")[2] for other in close[:i]]]
    hint = f". Did you mean {' or '.join(map(repr, close))}?" if close else f"; `align config explain KIND` lists the keys of {', '.join(MODELS)}"
    return f"no config has a key {key!r}{hint}"


def _entries(kind: str) -> list[Entry]:
    """Every key of a kind; of the stages' sections of a chain only what a stage alone does not have, the rest under the stage's own kind."""
    entries: list[Entry] = []

    def walk(model: type[BaseModel], before: str, known: Container[str] = ()) -> None:
        for name, field in model.model_fields.items():
            if name in known:
                continue
            key = field.alias or name
            entries.append(Entry(kind, before + key, model, field))
            for section in models_in(field.annotation):
                walk(section, f"{before}{key}.", MODELS[key].model_fields if kind == "chain" and key in STAGES else ())

    walk(MODELS[kind], "")
    return entries


def _tag_of(owner: type[BaseModel]) -> str | None:
    """The key whose one value says which member of a union a section is."""
    return next((tag for tag in TAGS if tag in owner.model_fields and len(get_args(owner.model_fields[tag].annotation)) == 1), None)


def _members(group: list[Entry], tag: str) -> list[str]:
    return list(dict.fromkeys(str(name) for entry in group for name in get_args(entry.owner.model_fields[tag].annotation)))


def _techniques(group: list[Entry]) -> str:
    """What each value of a key is for."""
    return "\n".join(f"{get_args(entry.field.annotation)[0]}: {entry.field.description}" for entry in {e.owner: e for e in group}.values())


def _block(group: list[Entry]) -> str:
    entry = group[0]
    field, description = entry.field, entry.field.description or ""
    tag = _tag_of(entry.owner)
    is_tag = tag is not None and entry.path.rpartition(".")[2] == tag
    is_kind = is_tag and tag == "kind"
    rows = [("type", "one of " + ", ".join(_members(group, tag)) if is_tag and tag else _type(field.annotation))]
    if unit := _unit(field, description):
        rows.append(("unit", unit))
    rows.append(("default", "none: must be given" if is_tag else _default(field)))
    allowed = _allowed(field)
    if allowed:
        rows.append(("allowed", allowed))
    rows.append(("meaning", "What scores: the trained reward model, a rule, or your own function." if is_kind else _techniques(group) if is_tag else description))
    sections = models_in(field.annotation)
    if sections:
        inner = dict.fromkeys(f.alias or name for section in sections for name, f in section.model_fields.items())
        rows.append(("keys", ", ".join(inner)))
    kinds = dict.fromkeys(e.kind for e in group)
    if tag is not None and not is_tag and entry.path.rpartition(".")[2] != "weight":
        rows.append(("scorer" if tag == "kind" else "technique", f"{tag}: " + ", ".join(_members(group, tag))))
    rows.append(("used by", ", ".join(kinds)))
    if entry.path in SHARED and any(kind in STAGES for kind in kinds):
        rows.append(("in a chain", f"give `{entry.path}` once at the top; a stage's section may say otherwise"))
    width = max(len(label) for label, _ in rows) + 2
    return "\n".join([entry.path, *(f"  {label:<{width}}" + text.replace("\n", "\n" + " " * (width + 2)) for label, text in rows)])


def _list_of_keys(kind: str) -> str:
    """The keys of a kind with type and default, one a line."""
    rows: dict[str, tuple[str, str]] = {}
    for e in _entries(kind):
        rows.setdefault(e.path, (_type(e.field.annotation), _default(e.field)))
        if (tag := _tag_of(e.owner)) == e.path.rpartition(".")[2] and tag is not None:
            rows[e.path] = ("one of " + ", ".join(_members([o for o in _entries(kind) if o.path == e.path], tag)), "none: must be given")
    path_width, type_width = max(map(len, rows)), min(max(len(row[0]) for row in rows.values()), 40)
    lines = [f"{path:<{path_width}}  {type_:<{type_width}}  {default}".rstrip() for path, (type_, default) in rows.items()]
    return "\n".join([f"{kind}: {(model_of(kind).__doc__ or '').strip()}", "", *lines])


def _type(annotation: Any) -> str:
    """A type as a person says it: `number`, `text`, `list of …`, `… or null`."""
    simple = {int: "whole number", float: "number", str: "text", bool: "true or false", Path: "path", type(None): "null", Any: "any value"}
    if annotation is Any or (isinstance(annotation, type) and annotation in simple):
        return simple[annotation]
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(arguments[0])
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(_type(a) for a in arguments))
    if origin is list:
        return f"list of {_type(arguments[0])}s" if arguments else "list"
    if origin is dict:
        return f"mapping of text to {_type(arguments[1])}" if arguments else "mapping"
    return str(annotation)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "none: must be given"
    default = field.get_default(call_default_factory=True, validated_data={})
    if default is PydanticUndefined:
        return "none: must be given"
    if isinstance(default, BaseModel):
        return "the defaults of its keys"
    return str(default) if isinstance(default, Path) else show(default)


def _constraints(field: FieldInfo) -> dict[str, Any]:
    """Limits of a field, also of `PositiveInt | None`."""
    found: dict[str, Any] = {}

    def gather(part: Any) -> None:
        for inner in getattr(part, "metadata", ()):
            gather(inner)
        for name in ("gt", "ge", "lt", "le", "min_length", "pattern"):
            if (value := getattr(part, name, None)) is not None:
                found[name] = value
        if get_origin(part) in (Annotated, typing.Union, types.UnionType):
            for inner in get_args(part):
                gather(inner)

    gather(field.annotation)
    gather(field)
    return found


def _allowed(field: FieldInfo) -> str:
    limits = _constraints(field)
    words = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
    parts = [f"{word} {limits[name]:g}" for name, word in words.items() if name in limits]
    if "min_length" in limits:
        parts.append(f"at least {limits['min_length']} item")
    if "pattern" in limits:
        parts.append(f"text that matches {limits['pattern']}")
    return ", ".join(parts)


def _unit(field: FieldInfo, description: str) -> str:
    if not {int, float} & set(_numbers(field.annotation)):
        return ""
    return next((unit for pattern, unit in UNITS if re.search(pattern, description)), "")


def _numbers(annotation: Any) -> list[Any]:
    arguments = get_args(annotation)
    return [annotation] if not arguments else [n for a in arguments for n in _numbers(a)]


def json_schema(kind: str) -> dict[str, Any]:
    """JSON schema (draft 2020-12) of a kind, as a file writes it: in a chain the stages' shared keys are optional."""
    schema = model_of(kind).model_json_schema(by_alias=True)
    if kind == "chain":
        for stage in STAGES:
            definition = schema["$defs"][models_in(MODELS[kind].model_fields[stage].annotation)[0].__name__]
            definition["required"] = [key for key in definition.get("required", []) if key not in FILLED]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
