"""Aliases such as ppo/demo@production: moved by compare-and-set, with a history, and back again.

Where an alias points is its highest entry; nothing in a history is ever changed, a rollback is one more entry.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.errors import UserError
from stages.registry import ledger, trash
from stages.registry.manifest import Checkpoint
from stages.registry.names import check_alias, now, split_family
from stages.registry.storage import fsync_dir, storage_error

if TYPE_CHECKING:
    from stages.registry.registry import Registry


def move(registry: Registry, family: str, alias: str, ref: str, expect: str | None, undoes: tuple[int, int] | None = None) -> Checkpoint:
    """Registry.set_alias. undoes: in a rollback, the number of the move that is undone and that of the newest entry, after which nothing may
    have happened."""
    stage, name = split_family(family)
    check_alias(alias)
    target = registry.resolve(ref)
    if (target.stage, target.name) != (stage, name):
        raise UserError(f"{family}@{alias} can only point at a version of {family}; {ref} is {target.ref}")
    held = registry.lease(target, f"{family}@{alias} is moved to it", renewed=False)  # however long the reading takes, it can't be purged meanwhile
    try:
        return _move(registry, family, alias, target, expect, undoes)
    finally:
        if held is not None:
            held.give_back()


def _move(registry: Registry, family: str, alias: str, target: Checkpoint, expect: str | None, undoes: tuple[int, int] | None) -> Checkpoint:
    if problems := registry.verify(target.id, deep=True):
        raise UserError(f"{target.ref} is damaged, {family}@{alias} was not moved: {problems[0]}")
    wanted = registry.id_of(expect) if expect else expect
    folder = _folder(registry, family, alias)

    def entry(number: int) -> dict[str, Any]:
        here = ledger.read(folder, number - 1)["id"] if number > 1 else ""
        if wanted is not None and wanted != here:
            raise UserError(f"{family}@{alias} was not moved: it points at {registry.ref_of(here)}, expected {expect or 'no alias yet'}")
        if undoes is not None and number != undoes[1] + 1:
            raise UserError(f"{family}@{alias} was not rolled back: it was moved meanwhile; see: align registry alias {family} {alias}")
        facts = {"alias": alias, "id": target.id, "ref": target.ref, "manifest_hash": target.manifest_hash}
        return {**facts, "previous": here, "created": now(), **({"undoes": undoes[0]} if undoes else {})}

    try:
        fsync_dir(registry.root / "checkpoints")  # who published the target may have been killed before the disk confirmed its name
        ledger.append(folder, entry)
        # gc moves a checkpoint first and looks for aliases then; it may have looked before this one was there
        there = trash.bring_back(registry.root, target.id, f"{family}@{alias} points at it")
    except OSError as error:
        if told := storage_error(error, f"moving {family}@{alias}"):
            raise told from error
        raise
    if not there:
        raise UserError(f"{target.ref} was purged while {family}@{alias} was moved to it; move it elsewhere: align registry alias {family} {alias} REF")
    return target


def rollback(registry: Registry, family: str, alias: str) -> Checkpoint:
    """Registry.rollback_alias."""
    entries = history(registry, family, alias)
    if not entries:
        raise UserError(f"{family} has no alias {alias!r} in {registry.root}; see: align registry alias {family}")
    standing = not_rolled_back(entries)
    if len(standing) < 2:
        raise UserError(f"{family}@{alias} has nowhere to go back to: it points at {entries[-1]['ref']}, where it began; see: align registry alias {family} {alias}")
    undone, before = standing[-1], standing[-2]
    if not (registry.root / "checkpoints" / before["id"]).is_dir() and not trash.bring_back(registry.root, before["id"], f"rollback of {family}@{alias}"):
        raise UserError(
            f"{family}@{alias} can't go back to {before['ref']} ({before['id']}), which is not in {registry.root} any more; "
            f"point it at another: align registry alias {family} {alias} REF"
        )
    return move(registry, family, alias, before["id"], expect=None, undoes=(undone["number"], entries[-1]["number"]))


def rollback_target(registry: Registry, family: str, alias: str) -> str | None:
    """Registry.rollback_target."""
    standing = not_rolled_back(history(registry, family, alias))
    return str(standing[-2]["id"]) if len(standing) > 1 else None


def not_rolled_back(entries: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The moves that still stand, oldest first: each rollback takes the newest of them away. The last is where the alias points; a move to
    where it points already is none."""
    standing: list[Mapping[str, Any]] = []
    for entry in entries:
        if "undoes" in entry:
            standing = [item for item in standing if item["number"] < entry["undoes"]]
        elif not standing or standing[-1]["id"] != entry["id"]:
            standing.append(entry)
    return standing


def history(registry: Registry, family: str, alias: str) -> list[dict[str, Any]]:
    """Registry.alias_history."""
    folder = _folder(registry, family, check_alias(alias))
    return [{"number": number, **ledger.read(folder, number)} for number in ledger.numbers(folder)]


def targets(registry: Registry, family: str) -> dict[str, str]:
    """Registry.aliases."""
    stage, name = split_family(family)
    folder = registry.root / "aliases" / stage / name
    names = sorted(os.listdir(folder)) if folder.is_dir() else []
    heads = {alias: ledger.numbers(folder / alias) for alias in names if not alias.startswith(".")}
    return {alias: ledger.read(folder / alias, there[-1])["id"] for alias, there in heads.items() if there}


def _folder(registry: Registry, family: str, alias: str) -> Path:
    stage, name = split_family(family)
    return registry.root / "aliases" / stage / name / alias
