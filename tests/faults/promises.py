"""What a registry has acknowledged, and what must hold of its folder after any fault."""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass, field
from pathlib import Path

from configs.errors import UserError
from stages.registry import Checkpoint, Registry, ledger
from stages.registry.integrity import check
from stages.registry.names import is_id


@dataclass
class Promises:
    """Acknowledged: checkpoints (id -> ref), the moves of each alias in their order (stage/name@alias -> ids), and that the registry is there.

    released: checkpoints that gc was told it may move away. saves: folder of a run's saves, relative to what is around the registry -> step -> which
    attempt at it. states: ids whose resumable state is kept.
    """

    opened: bool = False
    checkpoints: dict[str, str] = field(default_factory=dict)
    aliases: dict[str, list[str]] = field(default_factory=dict)
    released: set[str] = field(default_factory=set)
    saves: dict[str, dict[int, int]] = field(default_factory=dict)
    states: set[str] = field(default_factory=set)

    def copy(self) -> Promises:
        return copy.deepcopy(self)

    def published(self, checkpoint: Checkpoint) -> None:
        self.opened = True
        self.checkpoints[checkpoint.id] = checkpoint.ref

    def moved(self, alias: str, checkpoint: Checkpoint) -> None:
        self.aliases.setdefault(alias, []).append(checkpoint.id)


def broken(root: Path, promises: Promises) -> list[str]:
    """What does not hold: an acknowledged checkpoint, alias move or save that is lost or changed, anything invalid that is visible."""
    from tests.faults.run_saves import broken_saves, broken_states  # only where saves are promised is torch looked for

    lost = broken_saves(root.parent, promises) if promises.saves else []
    try:
        registry = Registry(root, create=False)
        found = _invisible(registry) + _trash(registry) + _lost(registry, promises) + _moved(registry, promises)
        return lost + found + broken_states(registry, promises)
    except UserError as error:
        return lost + ([f"does not open: {error}"] if promises.opened else [])


def _invisible(registry: Registry) -> list[str]:
    """Everything that can be seen is whole."""
    found = [f"{name} is visible and damaged: {problem}" for name, problem in registry.damaged().items()]
    for item in registry.list():
        found += [f"{item.ref} is visible and not whole: {problem}" for problem in registry.verify(item.id, deep=True)]
        claims = registry.root / "versions" / item.stage / item.name
        try:
            if ledger.read(claims, item.version)["id"] != item.id:
                found.append(f"version {item.version} belongs to another checkpoint than {item.id}")
        except UserError as error:
            found.append(f"{item.ref} has lost its claim on the number, which another could take: {error}")
    return found


def _trash(registry: Registry) -> list[str]:
    """Everything that can be restored is whole."""
    folder = registry.root / "trash"
    found = [] if not folder.is_dir() else [name for name in sorted(os.listdir(folder)) if is_id(name)]
    return [f"{name} in the trash is not whole: {problem}" for name in found for problem in check(folder / name, deep=True)]


def _lost(registry: Registry, promises: Promises) -> list[str]:
    found = []
    for checkpoint_id, ref in promises.checkpoints.items():
        try:
            if registry.resolve(checkpoint_id).ref != ref or registry.resolve(ref).id != checkpoint_id:
                found.append(f"{ref} is another checkpoint now")
            if checkpoint_id not in promises.released and (registry.root / "trash" / checkpoint_id).is_dir():
                found.append(f"{ref} is in its place and in the trash")
        except UserError as error:
            if checkpoint_id not in promises.released:
                found.append(f"{ref} is lost: {error}")
    return found


def _moved(registry: Registry, promises: Promises) -> list[str]:
    found = []
    for name, moves in promises.aliases.items():
        family, _, alias = name.partition("@")
        history = [entry["id"] for entry in registry.alias_history(family, alias)]
        if history[: len(moves)] != moves:
            found.append(f"{name} has the history {history}, acknowledged were {moves}")
        elif registry.verify(name, deep=True):
            found.append(f"{name} points at a damaged checkpoint")
    return found


def leftovers(root: Path) -> list[str]:
    """What killed writers left, relative to the registry."""
    found = []
    for folder, below, files in os.walk(root):
        found += [os.path.relpath(os.path.join(folder, name), root) for name in (*below, *files) if name.startswith((".tmp-", ".shared-", ".purged-"))]
        below[:] = [name for name in below if not name.startswith(".tmp-") and not (is_id(name) and Path(folder).name == "checkpoints")]
    return sorted(found)
