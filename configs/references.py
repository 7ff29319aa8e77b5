"""Names of published checkpoints in a config: which there are, and a config in which each of them is one version."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

_REFERENCE = re.compile(r"^(sft|reward|dpo|ppo)/[a-z0-9][a-z0-9._-]*(@.+)?$")


def is_reference(text: Any) -> bool:
    """Whether a config value names a checkpoint of the registry rather than a folder or a model of the hub."""
    return isinstance(text, str) and bool(_REFERENCE.match(text))


def references(config: Any) -> dict[str, str]:
    """role -> registry reference, of everything that a stage's config or the evaluation starts from or uses."""
    found = {key: getattr(config, key, None) for key in ("init_from", "reference", "value_init")}
    found |= _scorer_references(getattr(config, "scorers", None), "scorers.")
    found |= _scorer_references(getattr(getattr(config, "evaluation", None), "scorers", None), "evaluation.scorers.")
    for label, checkpoint in (getattr(config, "checkpoints", None) or {}).items():
        found[f"checkpoints.{label}"] = checkpoint
    return {role: ref for role, ref in found.items() if ref is not None and is_reference(ref)}


def _scorer_references(scorers: Any, prefix: str) -> dict[str, str | None]:
    """Role -> the reward model of each scorer, or of each member of an ensemble."""
    found: dict[str, str | None] = {}
    for number, scorer in enumerate(scorers or []):
        found[f"{prefix}{number}"] = getattr(scorer, "checkpoint", None)
        found |= {f"{prefix}{number}.{member}": name for member, name in enumerate(getattr(scorer, "checkpoints", []))}
    return found


def pin(config: Any, pinned: Callable[[str], str]) -> Any:
    """A copy of a config in which every registry reference is what `pinned` makes of it, such as sft/demo -> sft/demo@3."""
    refs = references(config)
    update: dict[str, Any] = {role: pinned(ref) for role, ref in refs.items() if "." not in role}

    def scorers(owner: Any, prefix: str) -> list[Any]:
        return [_pinned_scorer(scorer, f"{prefix}{number}", refs, pinned) for number, scorer in enumerate(owner.scorers)]

    if any(role.startswith("scorers.") for role in refs):
        update["scorers"] = scorers(config, "scorers.")
    if any(role.startswith("evaluation.scorers.") for role in refs):
        update["evaluation"] = config.evaluation.model_copy(update={"scorers": scorers(config.evaluation, "evaluation.scorers.")})
    if any(role.startswith("checkpoints.") for role in refs):
        update["checkpoints"] = {
            label: pinned(ref) if f"checkpoints.{label}" in refs else ref for label, ref in config.checkpoints.items()
        }
    return config.model_copy(update=update)


def _pinned_scorer(scorer: Any, role: str, refs: dict[str, str], pinned: Callable[[str], str]) -> Any:
    if role in refs:
        return scorer.model_copy(update={"checkpoint": pinned(scorer.checkpoint)})
    members = getattr(scorer, "checkpoints", [])
    update = [pinned(name) if f"{role}.{member}" in refs else name for member, name in enumerate(members)]
    return scorer.model_copy(update={"checkpoints": update}) if members else scorer
