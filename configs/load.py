"""Config files in and out: YAML with overrides becomes a checked model, or one error that holds every problem."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from configs import presets
from configs.errors import UserError
from configs.overrides import Places, apply_overrides, escape_references, resolve_references
from configs.problems import describe, did_you_mean, show
from configs.schema import Chain, DPOStage, EvalConfig, PPOStage, PPOTrain, RewardStage, SFTStage
from configs.schema.chain import STAGES, fill_places, fill_sections, forget_inherited
from configs.schema.sweep import Sweep
from configs.trainer_args import KINDS_WITH_TRAINER, trainer_problems
from configs.yaml_lines import Key, parse, read_text, to_yaml

MODELS: dict[str, type[BaseModel]] = {
    "sft": SFTStage,
    "reward": RewardStage,
    "dpo": DPOStage,
    "ppo": PPOStage,
    "eval": EvalConfig,
    "chain": Chain,
    "sweep": Sweep,
}


def load(path: Path | str, kind: str, overrides: Sequence[str] = ()) -> Any:
    """Read a config file and return the model of its kind (sft, reward, dpo, ppo, eval, chain, sweep), complete and checked.

    Overrides are `a.b=VALUE` or `data.0.path=VALUE` with VALUE in YAML; they win over the file. After them `${key}` is
    replaced by the value of the file's top-level `key` (`$${key}` stands for the text itself). Relative paths mean what
    they mean in the shell: they start at the working directory, not at the config file.

    Raises UserError with one line for every problem, `file:line: field: what is wrong`.
    """
    name = str(path)
    document = parse(read_text(path), name)
    if document.data is None:
        raise UserError(f"{name}:1: the file is empty; expected the keys of a {kind} config (align config explain {kind} lists them)")
    if not isinstance(document.data, dict):
        raise UserError(f"{name}:1: found {show(document.data)} at the top; expected keys such as `name: demo`")
    places = Places(name, document.lines)
    problems = [f"{name}:{line}: {message}" for line, message in document.problems]
    if kind == "chain" and overrides:
        forget_inherited(document.data)
    problems += apply_overrides(document.data, overrides, places)
    return _build(document.data, kind, places, problems)


def load_text(text: str, kind: str, name: str = "config") -> Any:
    """As `load`, for text that `dump` wrote; `name` stands for the file in errors."""
    document = parse(text, name)
    if not isinstance(document.data, dict):
        raise UserError(f"{name}:1: expected the keys of a {kind} config")
    problems = [f"{name}:{line}: {message}" for line, message in document.problems]
    return _build(document.data, kind, Places(name, document.lines), problems)


def load_mapping(data: dict[str, Any], kind: str, overrides: Sequence[str] = (), name: str = "config", lines: dict[Key, int] | None = None) -> Any:
    """As `load`, for keys that were put together; `name` and `lines` (key -> line) say where problems are told to be."""
    places = Places(name, lines or {})
    problems = apply_overrides(data, overrides, places)
    return _build(data, kind, places, problems)


def _build(data: dict[str, Any], kind: str, places: Places, problems: list[str]) -> Any:
    """Resolve references, check everything, and raise all problems at once."""
    model = model_of(kind)
    settable = {key: "PATH" if "Path" in str(field.annotation) else "VALUE" for key, field in model.model_fields.items()}
    if kind == "chain":
        data = fill_places(data)
    data, unresolved = resolve_references(data, places, settable)
    problems += unresolved
    problems += _trainer(data, kind, places)
    data = _with_preset(data, kind, places)
    try:
        # JSON mode is the strict one that takes text for a path and a whole number for a float, and nothing else.
        built = model.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        problems += describe(error.errors(include_url=False), model, fill_sections(data) if kind == "chain" else data, places)
    if problems:
        raise UserError("\n".join(sorted(dict.fromkeys(problems), key=_line_number)))
    return built


def _with_preset(data: dict[str, Any], kind: str, places: Places) -> dict[str, Any]:
    """The config with what a PPO preset fills in, whose place is the preset's: problems with such a value point there."""
    section, at = {"ppo": (data, ()), "chain": (data.get("ppo"), ("ppo",))}.get(kind, (None, ()))
    if not isinstance(section, dict):
        return data
    filled, paths = presets.filled(section, PPOTrain.model_fields["iterations"].default)
    for path in paths:
        places.fill((*at, *path), places.of((*at, "preset")))
    return filled if kind == "ppo" else {**data, "ppo": filled}


def _line_number(problem: str) -> int:
    """The line a problem stands at; those of the command line come last."""
    at = re.match(r".*?:(\d+): ", problem)
    return int(at[1]) if at and not problem.startswith("command line: ") else sys.maxsize


def _trainer(data: dict[str, Any], kind: str, places: Places) -> list[str]:
    """Problems of the `trainer:` sections."""
    sections = [(stage, (stage,), data.get(stage)) for stage in STAGES] if kind == "chain" else [(kind, (), data)]
    problems = []
    for stage, at, section in sections:
        arguments = section.get("trainer") if isinstance(section, dict) and stage in KINDS_WITH_TRAINER else None
        if isinstance(arguments, dict):
            for key, message in trainer_problems(stage, arguments):
                path = (*at, "trainer", key)
                problems.append(f"{places.of(path)}: {'.'.join(path)}: {message}")
    return problems


def model_of(kind: str) -> type[BaseModel]:
    """The schema of a kind of config."""
    if kind not in MODELS:
        raise UserError(f"no config is of kind {kind!r}; expected one of {', '.join(MODELS)}{did_you_mean(kind, MODELS)}")
    return MODELS[kind]


def dump(model: BaseModel) -> str:
    """The resolved config as YAML: every field written out; `load` reads it back to an equal model."""
    return to_yaml(escape_references(model.model_dump(mode="json", by_alias=True)))


def save(model: BaseModel, path: Path | str) -> None:
    """Write `dump(model)` to a file, whole or not at all."""
    path = Path(path)
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(dump(model), encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}; give another output folder with output=PATH") from error
