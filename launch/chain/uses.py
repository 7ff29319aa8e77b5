"""Which of a chain's own steps a step uses: checkpoints that it names, files that another one writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from configs.references import is_reference, references
from launch.chain.inputs import FILE_KEYS, named
from launch.chain.steps import Step, evaluation_config, made_by, sections


def texts_in(value: Any) -> list[str]:
    """Every text in nested mappings and lists."""
    if isinstance(value, dict):
        return [text for inner in value.values() for text in texts_in(inner)]
    if isinstance(value, list):
        return [text for inner in value for text in texts_in(inner)]
    return [value] if isinstance(value, str) else []


def uses(chain: Any, refs: list[str], config: dict[str, Any]) -> list[str]:
    """Names of the steps that make what `refs` (references) and `config` (files; of a prepare step its arguments, under `with`) name."""
    found = [name for ref in refs if (name := made_by(chain, ref)) is not None]
    paths = [Path(text) for text in (*named(config, FILE_KEYS), *texts_in(config.get("with", {})))]
    for name, spec in chain.prepare.items():
        if any(path == written or written in path.parents for written in spec.writes for path in paths):
            found.append(name)
    return found


def used_by(chain: Any, step: Step) -> set[str]:
    """Names of the steps that a step uses directly."""
    if step.kind == "prepare":
        spec = chain.prepare[step.name]
        found = uses(chain, [text for text in texts_in(spec.arguments) if is_reference(text)], {"with": spec.arguments})
    else:
        section = sections(chain)[step.name] if step.kind == "stage" else evaluation_config(chain, chain.output / "eval")
        found = uses(chain, list(references(section).values()), section.model_dump(mode="json", by_alias=True))
    return set(found) - {step.name}
