"""What is swept: a chain's file, or one stage's, as a chain with any values in it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.errors import UserError
from configs.load import dump, load
from configs.schema import Chain
from configs.schema.chain import STAGES
from launch.sweep.space import override

if TYPE_CHECKING:
    from pydantic import BaseModel

MISSING = object()


@dataclass(frozen=True)
class Subject:
    """A YAML file of `kind` (chain, or a stage) with the overrides that every trial has."""

    file: str
    kind: str
    overrides: tuple[str, ...] = ()

    def key(self, key: str) -> str:
        """A key as a chain has it: sft.train.learning_rate, for a stage's own file may say train.learning_rate."""
        return key if self.kind == "chain" or key.startswith(f"{self.kind}.") else f"{self.kind}.{key}"

    def _own(self, key: str) -> str:
        return key if self.kind == "chain" else key.removeprefix(f"{self.kind}.")

    def model(self) -> type[BaseModel]:
        """The schema that the keys of the space belong to, as a chain has them."""
        return Chain

    def config(self, values: Iterable[tuple[str, Any]] = ()) -> Any:
        """The file's own config (a chain or a stage) with these values (key, value).

        Raises:
            UserError: with everything that is wrong; what a value of the space is wrong about stands behind `space:`.
        """
        swept = [override(self._own(key), value) for key, value in values]
        try:
            return load(self.file, self.kind, [*self.overrides, *swept])
        except UserError as error:
            raise UserError(_blamed(str(error), swept)) from error

    def chain(self, values: Iterable[tuple[str, Any]] = (), places: Sequence[tuple[str, Any]] = ()) -> Any:
        """The chain with these values: of a stage's file a chain of that stage alone. `places` (output, registry) are a chain's keys."""
        if self.kind == "chain":
            return self.config([*values, *places])
        cfg = self.config(values)
        section = cfg.model_dump(mode="json", by_alias=True)
        where = {"output": str(cfg.output or Path("runs") / f"{self.kind}-{cfg.name}"), "registry": section["registry"]} | dict(places)
        shared = {key: section[key] for key in ("name", "seed", "split")}
        return Chain.model_validate_json(json.dumps({**shared, "base": cfg.init_from, **where, self.kind: section}), strict=True)

    def configured(self, key: str) -> Any:
        """What the config says of a field as a chain has it; MISSING where it says nothing (in a section that is not there)."""
        here: Any = self.chain().model_dump(mode="json", by_alias=True)
        for part in key.split("."):
            if isinstance(here, list) and part.isdecimal() and int(part) < len(here):
                here = here[int(part)]
            elif isinstance(here, dict) and part in here:
                here = here[part]
            else:
                return MISSING
        return here

    def text(self, values: Iterable[tuple[str, Any]]) -> str:
        """The file with these values, resolved, as YAML that runs as it is."""
        cfg = self.config(values)
        return dump(cfg.model_copy(update={"sweep": None}) if self.kind == "chain" else cfg)

    def command(self, values: Iterable[tuple[str, Any]]) -> str:
        """The line that a person types to run it with these values."""
        words = ["align", "run", self.file] if self.kind == "chain" else ["align", self.kind, "--config", self.file]
        return shlex.join([*words, *self.overrides, *(override(self._own(key), value) for key, value in values)])


def subject_of(file: str, overrides: Sequence[str], stage: str | None = None) -> Subject:
    """The file as what its keys say it is. `stage`: what it is, if it is a stage's file whose keys do not tell.

    Raises:
        UserError: it is neither a chain nor a stage, or does not say which stage.
    """
    from launch.config_cli import likely_kinds

    kinds = likely_kinds(file)
    if len(kinds) > 1 and stage not in kinds:
        raise UserError(f"{file}: its keys do not tell which stage's config this is; say so with --stage ({', '.join(kinds)})")
    kind = str(stage) if len(kinds) > 1 else kinds[0]
    if kind not in ("chain", *STAGES):
        raise UserError(f"{file}: this is a config of kind {kind}; expected a chain or the config of a stage ({', '.join(STAGES)})")
    return Subject(file, kind, tuple(overrides))


def _blamed(problems: str, swept: Sequence[str]) -> str:
    """Problems with values of the space say so."""
    lines = []
    for line in problems.splitlines():
        mine = next((word for word in swept if line.startswith(f"command line: {word}")), None)
        lines.append(f"space: {mine}{line.removeprefix(f'command line: {mine}')}" if mine else line)
    return "\n".join(lines)
