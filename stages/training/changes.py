"""What a save depends on, and what of it has changed since: a diff that a person can read, and what it takes to go on all the same."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from configs.schema import StageConfig
from stages.training.ranks import world_size
from stages.zero.machine import zero_stage

# Fields that do not change what is computed.
NOT_COMPARED = {"allow_changed", "machine", "processes", "output", "registry", "health", "guard", "offload_frozen", "watchdog", "keep_resume", "train.save_every"}
SCHEDULE = {
    f"train.{name}" for name in (
        "epochs", "max_steps", "batch_size", "micro_batch_size", "learning_rate", "schedule", "warmup", "iterations", "rollout_batch_size", "num_ppo_epochs",
        "num_minibatches", "value_learning_rate",
    )
}  # fmt: skip
DATA = {"data", "prompts", "demonstrations"}
FEW = 3  # fields that a refusal names one by one
LAYOUT = "the optimizer's state lies in one part for each process and can't be cut anew: continue with the machine file and number of processes that it was made with"


class Change(NamedTuple):
    """One thing that differs: its name, before, now, the key of `allow_changed` that allows it (None: nothing does), why not, and whether it is a
    field of the config."""

    field: str
    was: Any
    now: Any
    key: str | None
    why: str = ""
    of_config: bool = False

    def __str__(self) -> str:
        return f"{self.field}: {_shown(self.was)} → {_shown(self.now)}" + (f" ({self.why})" if self.why else "")


def identity(cfg: StageConfig, *, data: Any, tokenizer: str, parents: list[str]) -> dict[str, Any]:
    """What a save depends on: data fingerprints, tokenizer and template digests, number of processes, ZeRO stage, config and parents.

    `tokenizer` is `ModelTokens.key`, the two digests with a colon between them.
    """
    digest, _, template = tokenizer.partition(":")
    return {
        "data": data, "tokenizer": digest, "template": template, "processes": world_size(), "zero_stage": zero_stage(),
        "config": flat(cfg.model_dump(mode="json")), "parents": parents,
    }  # fmt: skip


def flat(value: Any, at: str = "") -> dict[str, Any]:
    """Nested mappings as one level, `train.learning_rate`; without what is not compared."""
    if not isinstance(value, dict) or not value:
        return {at: value}
    return {k: v for key, inner in value.items() for k, v in flat(inner, f"{at}.{key}" if at else str(key)).items() if k not in NOT_COMPARED and k.split(".")[0] not in NOT_COMPARED}


def changes(before: dict[str, Any], now: dict[str, Any]) -> list[Change]:
    """What differs between what a save was made from and what a run has now; what a save does not say is not compared."""
    out = []
    for key in ("data", "tokenizer", "template", "steps", "processes", "zero_stage", "parents", "config"):
        if key not in before:
            continue
        old, new = (flat(x.get(key)) if key in ("data", "config") else {"": x.get(key)} for x in (before, now))
        for name in [*old, *(name for name in new if name not in old)]:
            if old.get(name) != new.get(name):
                out.append(_change(key, name, old.get(name), new.get(name), now["zero_stage"]))
    return out


def _change(part: str, name: str, was: Any, now: Any, zero: int) -> Change:
    if part == "config":
        return Change(name, was, now, group_of(name), of_config=True)
    if part == "zero_stage":
        return Change(part, was, now, None, f"the machine file's; 0: no DeepSpeed; {LAYOUT}")
    if part == "processes":
        return Change(part, was, now, None if zero else "processes", LAYOUT if zero else "")
    field = ".".join(filter(None, (part, name)))
    return Change(field, was, now, {"steps": "schedule", "parents": "config"}.get(part, part), of_config=part in ("steps", "parents"))


def group_of(field: str) -> str:
    """The key of `allow_changed` that a field of the config belongs to."""
    top = field.split(".")[0]
    if field in SCHEDULE:
        return "schedule"
    return "data" if top in DATA else "template" if top == "template" else "config"


def refused(found: Iterable[Change], allowed: Iterable[str]) -> list[Change]:
    """Those that are not allowed. `config` allows every field of the config; a field's own name, or its section's, allows it alone."""
    keys = set(allowed)

    def fine(change: Change) -> bool:
        if change.key is None:
            return False
        parts = change.field.split(".")
        named = {".".join(parts[:end]) for end in range(1, len(parts) + 1)}
        return bool(keys & (named | {change.key})) or ("config" in keys and change.of_config)

    return [change for change in found if not fine(change)]


def narrowest(found: Iterable[Change], fields: Collection[str]) -> list[str]:
    """Keys of `allow_changed` that allow these changes and as little else as can be: of the config's `fields`, unless there are many of a group."""
    by_group: dict[str, list[str]] = {}
    for change in found:
        if change.key is not None:
            parts = change.field.split(".") if change.of_config else []
            named = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
            by_group.setdefault(change.key, []).append(next((name for name in named if name in fields), change.key))
    wide = {group for group, own in by_group.items() if group in own or len(set(own)) > FEW}
    return [key for group, own in by_group.items() for key in ([group] if group in wide else dict.fromkeys(own))]


def refusal(folder: Path, save: str, found: list[Change], fields: Collection[str] = ()) -> str:
    """The message for a resume that is refused; `fields` of the config may be allowed one by one."""
    lines = "".join(f"\n  {change}" for change in found)
    keys = narrowest(found, fields)
    allow = f"allow it with {' '.join(f'--allow-changed {key}' for key in keys)} (or allow_changed: [{', '.join(keys)}]), " if keys and all(c.key for c in found) else ""
    return f"{folder / save} was made otherwise (field: was → is):{lines}\nChange it back to continue, {allow}or delete {folder} to start anew"


def _shown(value: Any) -> str:
    if isinstance(value, str) and len(value) == 64:  # a digest
        return f"{value[:12]}…"
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
