"""Which steps of a chain a trial needs, which of them all trials share, and a chain that holds only some of them in a folder of its own."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.references import is_reference
from configs.schema import Chain
from configs.schema.chain import STAGES
from launch.chain.steps import Step, made_by, sections, stage_of, steps_of
from launch.chain.uses import texts_in, used_by


@dataclass(frozen=True)
class Parts:
    """Names of steps: what a trial's metric needs, and of that what no swept field changes, which is made once for all trials."""

    needed: frozenset[str]
    shared: frozenset[str]

    @property
    def own(self) -> frozenset[str]:
        """What every trial makes itself."""
        return self.needed - self.shared


def parts_of(chain: Any, keys: Iterable[str], stage: str) -> Parts:
    """The steps that the metric of `stage` (a stage or eval) needs where the fields `keys` are swept."""
    steps = steps_of(chain)
    by_name = {step.name: step for step in steps}
    direct = {step.name: used_by(chain, step) & set(by_name) for step in steps}
    targets = {name for name, step in by_name.items() if step.before == stage and step.kind != "prepare"}
    needed = _closed(targets, direct)
    swept = {name for name, step in by_name.items() if any(_touches(key, step) for key in keys)}
    inverse = {name: {other for other in by_name if name in direct[other]} for name in by_name}
    return Parts(frozenset(needed), frozenset(needed - _closed(swept, inverse)))


def _closed(start: set[str], follow: Mapping[str, set[str]]) -> set[str]:
    found, waiting = set(start), list(start)
    while waiting:
        more = follow[waiting.pop()] - found
        found |= more
        waiting += more
    return found


def _touches(key: str, step: Step) -> bool:
    """Whether a swept key is of a step's own section, or of what the whole chain shares."""
    first, _, rest = key.partition(".")
    if first == "prepare":
        return step.kind == "prepare" and rest.partition(".")[0] == step.name
    if first in (*STAGES, "eval"):
        return step.kind != "prepare" and stage_of(step.name) == first
    return True


def section_of(key: str) -> str | None:
    """The stage (or eval) that a key belongs to; None for a key of the whole chain or of a preparation."""
    first = key.partition(".")[0]
    return first if first in (*STAGES, "eval") else None


def outside(chain: Any) -> list[str]:
    """References of the chain to checkpoints that none of its own steps makes: they lie in its registry."""
    data = chain.model_dump(mode="json", by_alias=True, exclude={"sweep"})
    return sorted({text for text in texts_in(data) if is_reference(text) and made_by(chain, text) is None})


def excerpt(chain: Any, steps: frozenset[str], folder: Path, moved: frozenset[str] = frozenset(), rename: str | None = None) -> Any:
    """The chain with only these steps, working in `folder`. `moved`: preparations whose files go there too. `rename`: what its checkpoints are called.

    `chain` is resolved, with the output that all trials share: a path that is not moved stays where it is for all of them.
    """
    data: dict[str, Any] = chain.model_dump(mode="json", by_alias=True)
    shared = str(chain.output)
    places: dict[str, str] = {}
    for name in moved:
        for written in map(str, chain.prepare[name].writes):
            places[written] = f"{folder}{written.removeprefix(shared)}" if written.startswith(f"{shared}/") else f"{folder}/data/{Path(written).name}"
    present = {stage_of(name) for name in steps if name in sections(chain)}
    data |= {stage: data[stage] if stage in present else None for stage in STAGES}
    data["eval"] = data["eval"] if "eval" in steps else None
    data["prepare"] = {name: _moved_spec(spec, shared, str(folder)) if name in moved else spec for name, spec in data["prepare"].items() if name in steps}
    data = _replaced(data, places)
    data |= {"output": str(folder), "sweep": None}
    if rename is not None:
        made = [(stage_of(step), section.name) for step, section in sections(chain).items()]
        data = _replaced(data, {f"{stage}/{name}": f"{stage}/{rename}{name.removeprefix(chain.name)}" for stage, name in made})
    for stage in present:
        kept = bool(data[stage]["keep_resume"])  # nobody goes on from a trial's last state, unless the config says so
        data[stage] |= {"output": f"{folder}/{stage}", "registry": data["registry"], "keep_resume": kept} | ({"name": rename} if rename is not None else {})
    if rename is not None:
        data["name"] = rename
    return Chain.model_validate_json(json.dumps(data), strict=True)


def _moved_spec(spec: dict[str, Any], shared: str, folder: str) -> dict[str, Any]:
    """A preparation whose arguments name what it writes, or a folder around that, under the trial's folder."""
    around = {str(parent) for text in spec["writes"] for parent in Path(text).parents if str(parent).startswith(f"{shared}/") or str(parent) == shared}
    return _replaced(spec, {text: f"{folder}{text.removeprefix(shared)}" for text in around}, whole=True)


def _replaced(value: Any, by: Mapping[str, str], whole: bool = False) -> Any:
    """Nested values with every text that is a key of `by` (or, unless `whole`, a path below one) replaced."""
    if isinstance(value, dict):
        return {key: _replaced(inner, by, whole) for key, inner in value.items()}
    if isinstance(value, list):
        return [_replaced(inner, by, whole) for inner in value]
    if not isinstance(value, str) or not by:
        return value
    if value in by:
        return by[value]
    start = None if whole else next((old for old in by if value.startswith(f"{old}/")), None)
    return value if start is None else by[start] + value.removeprefix(start)
