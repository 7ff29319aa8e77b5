"""Trash: where gc moves checkpoints, from which anybody brings them back, and which is emptied after a time of grace.

ROOT/trash/<id>/                         a checkpoint as it was published
ROOT/trash/records/<id>/<number>.json    what happened to it: trashed (why), restored, purged; its time of grace begins with the record

gc announces with a record what it is about to move, then looks whether something refers to it, then moves. Who makes something refer to a
checkpoint (an alias, a lease, a child) looks afterwards for an announcement, waits for what comes of it, and moves the checkpoint back if it went.
Of two that act at once at least one sees the other, so that whoever was told "done" never misses the checkpoint for a moment. gc looks once
more when it has moved: that covers who waited too long for it, and who was killed before it had looked.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from configs.errors import UserError
from stages.registry import ledger
from stages.registry.holder import Holder, draft_name, is_leftover, provably_dead, this_process
from stages.registry.integrity import Problem, read_checkpoint
from stages.registry.manifest import MANIFEST, Checkpoint, parent_ids
from stages.registry.names import is_id, now
from stages.registry.sealing import unseal
from stages.registry.storage import durable_mkdir, durable_move

RECORDS = "records"
PATIENCE = 30.0  # seconds that somebody waits for a move that was announced by a process of which nothing is known
PURGED = ".purged-"  # before the id: what is being deleted


@dataclass(frozen=True)
class Trashed:
    """A checkpoint in the trash. `since`: when its newest record says so; None when no record does (gc then writes one)."""

    id: str
    ref: str
    size: int | None  # bytes; None where the manifest can't be read
    since: datetime | None
    why: str

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "since": self.since.isoformat(timespec="seconds") if self.since else None}


def trashed(root: Path) -> list[Trashed]:
    """What lies in the trash, oldest id first."""
    return [_trashed(root, name, root / "trash" / name) for name in _names(root / "trash") if is_id(name)]


def trashed_after_purges(root: Path, wanted: Container[str]) -> list[Trashed]:
    """What `trashed` lists when `finish_purges` has put back what killed purges left."""
    return [_trashed(root, key, folder) for key, folder in sorted(folders(root, wanted).items())]


def folders(root: Path, wanted: Container[str] = ()) -> dict[str, Path]:
    """Id -> folder of what `trashed_after_purges` lists, where it lies now."""
    halted = ((folder.name.removeprefix(PURGED), folder, recorded) for folder, recorded in left_by_purges(root))
    back = {key: folder for key, folder, recorded in halted if not recorded or key in wanted}
    return back | {name: root / "trash" / name for name in _names(root / "trash") if is_id(name)}


def _trashed(root: Path, checkpoint_id: str, folder: Path) -> Trashed:
    item = read(folder)
    last = last_event(root, checkpoint_id)
    valid = last.get("event") == "trashed"
    since = datetime.fromisoformat(str(last["created"])).astimezone(UTC) if valid else None
    ref = item.ref if isinstance(item, Checkpoint) else str(last.get("ref", checkpoint_id))
    return Trashed(checkpoint_id, ref, item.size if isinstance(item, Checkpoint) else None, since, str(last.get("why", "")) if valid else "")


def read(folder: Path) -> Checkpoint | Problem:
    """The checkpoint in a folder of the trash, one that a purge has renamed too, or what is wrong with its manifest."""
    if not folder.name.startswith(PURGED):
        return read_checkpoint(folder)
    try:
        return replace(Checkpoint.from_manifest(folder.with_name(folder.name.removeprefix(PURGED)), unseal((folder / MANIFEST).read_bytes())), path=folder)
    except (OSError, ValueError) as error:
        return Problem(MANIFEST, str(error))


def last_event(root: Path, checkpoint_id: str) -> dict[str, Any]:
    """The newest record of a checkpoint, {} when it has none or the record can't be read."""
    folder = root / "trash" / RECORDS / checkpoint_id
    numbers = ledger.numbers(folder)
    try:
        return ledger.read(folder, numbers[-1]) if numbers else {}
    except UserError:
        return {}


def newest(root: Path, checkpoint_id: str) -> int:
    """The number of a checkpoint's newest record; 0 when it has none."""
    return max(ledger.numbers(root / "trash" / RECORDS / checkpoint_id), default=0)


def record(root: Path, checkpoint_id: str, event: str, ref: str, why: str = "") -> None:
    """Write down what happens to a checkpoint, and who does it. Raises OSError."""
    body = {"id": checkpoint_id, "event": event, "ref": ref, "why": why, "created": now(), "by": this_process().to_json()}
    ledger.append(root / "trash" / RECORDS / checkpoint_id, lambda number: body)


def announce(root: Path, checkpoint_id: str, ref: str, why: str) -> None:
    """Say that a checkpoint is about to be moved to the trash. Raises OSError."""
    record(root, checkpoint_id, "trashed", ref, why)


def spare(root: Path, checkpoint_id: str, ref: str, why: str) -> None:
    """Take an announcement back. Raises OSError."""
    record(root, checkpoint_id, "kept", ref, why)


def put(root: Path, checkpoint_id: str) -> bool:
    """Move an announced checkpoint to the trash; False when another process has moved it. Raises OSError."""
    return _move(root / "checkpoints" / checkpoint_id, root / "trash" / checkpoint_id)


def bring_back(root: Path, checkpoint_id: str, why: str) -> bool:
    """Wait for a move that is announced, and undo it; whether the checkpoint is in its place now, whoever moved it. All that it was made from comes back with it.

    Raises OSError.
    """
    there = _bring_back(root, checkpoint_id, why)
    seen = [checkpoint_id] if there else []
    known = set(seen)
    for item in seen:  # it grows, with parents that are in their place too: they may be announced, or miss one of their own
        for parent in parents_in(root / "checkpoints" / item):
            if parent not in known:
                known.add(parent)
                seen.append(parent)
                _bring_back(root, parent, f"{item} was made from it")
    return there


def _bring_back(root: Path, checkpoint_id: str, why: str) -> bool:
    place, waiting = root / "checkpoints" / checkpoint_id, root / "trash" / checkpoint_id
    if place.is_dir():
        _await_mover(root, checkpoint_id)
    if not waiting.is_dir():
        return place.is_dir()
    item = read_checkpoint(waiting)
    if _move(waiting, place):
        record(root, checkpoint_id, "restored", item.ref if isinstance(item, Checkpoint) else checkpoint_id, why)
    return place.is_dir()


def _await_mover(root: Path, checkpoint_id: str) -> None:
    """Return when nobody is about to move a checkpoint that is in its place: it went, it was spared, or who announced it is dead or takes too long."""
    began = time.monotonic()
    while (last := last_event(root, checkpoint_id)).get("event") == "trashed" and (root / "checkpoints" / checkpoint_id).is_dir():
        if time.monotonic() - began > PATIENCE or _dead(last):
            return spare(root, checkpoint_id, str(last.get("ref", checkpoint_id)), "whoever announced the move did not make it")
        time.sleep(0.01)


def _dead(entry: dict[str, Any]) -> bool:
    try:
        return provably_dead(Holder.from_json(entry["by"]))
    except (KeyError, ValueError, TypeError, AttributeError):
        return False


def find(root: Path, ref: str) -> str | None:
    """The id of what lies in the trash under an id or a reference such as sft/demo@3."""
    if is_id(ref):
        return ref if (root / "trash" / ref).is_dir() else None
    return next((item.id for item in trashed(root) if item.ref == ref), None)


def purge(root: Path, checkpoint_ids: Iterable[str], wanted: Callable[[], Container[str]]) -> list[str]:
    """Delete checkpoints of the trash for good; ids of those deleted. What something refers to after all is back in its place instead, and what something
    that can still be restored was made from stays in the trash.

    wanted() gives the ids that something refers to: asked when they have left the trash, before the first file goes. Raises OSError.
    """
    leaving = [item for item in checkpoint_ids if _move(root / "trash" / item, root / "trash" / f"{PURGED}{item}")]
    if not leaving:
        return []
    made_from = {item: parents_in(root / "trash" / f"{PURGED}{item}") for item in leaving}
    found, waiting = _needed(root, set(leaving), wanted)
    kept = with_parents([item for item in leaving if item in found], made_from)
    stays = with_parents([item for item in leaving if waiting is None or item in waiting], made_from)
    deleted = []
    for item in leaving:
        aside, draft = root / "trash" / f"{PURGED}{item}", root / "trash" / draft_name()
        if item in kept:
            _move(aside, root / "trash" / item)
            bring_back(root, item, "something refers to it")
        elif item in stays:
            _move(aside, root / "trash" / item)
        elif _move(aside, draft):  # else another gc has put it back meanwhile
            record(root, item, "purged", str(last_event(root, item).get("ref", item)))
            shutil.rmtree(draft, ignore_errors=True)
            deleted.append(item)
    return deleted


def _needed(root: Path, leaving: set[str], wanted: Callable[[], Container[str]]) -> tuple[Container[str], set[str] | None]:
    """What something refers to, and what anything that lies in the trash, but for what leaves it, was made from; None where that could not be told, because others
    went on moving things: then nothing may be deleted. What comes or goes while one looks changes the list of names, and one looks again.
    """
    for _ in range(10):
        names = _contents(root)
        folders = [root / "trash" / name for name in names if name.removeprefix(PURGED) not in leaving]
        waiting = {parent for folder in folders for parent in parents_in(folder)}
        found = wanted()
        if all(folder.is_dir() for folder in folders) and _contents(root) == names:
            return found, waiting
    return found, None


def _contents(root: Path) -> list[str]:
    """The names in the trash that are checkpoints', also of those being deleted."""
    return [name for name in _names(root / "trash") if is_id(name.removeprefix(PURGED))]


def with_parents(ids: Iterable[str], made_from: Mapping[str, Iterable[str]]) -> dict[str, None]:
    """The ids, and all that they were made from, as far as `made_from` knows it: id -> its parents. In order, as a dict's keys."""
    found = dict.fromkeys(ids)
    growing = list(found)
    for item in growing:
        for parent in made_from.get(item, ()):
            if parent in made_from and parent not in found:
                found[parent] = None
                growing.append(parent)
    return found


def parents_in(folder: Path) -> list[str]:
    """Ids of what the checkpoint in a folder, whatever that is called, was made from; [] where its manifest can't be read."""
    try:
        return parent_ids(unseal((folder / MANIFEST).read_bytes()))
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return []


def finish_purges(root: Path, wanted: Container[str]) -> None:
    """Complete what a killed purge has left: deleted where it was recorded as purged, else put back into the trash."""
    for folder, recorded in left_by_purges(root):
        checkpoint_id = folder.name.removeprefix(PURGED)
        if recorded and checkpoint_id not in wanted:
            shutil.rmtree(folder, ignore_errors=True)
        elif _move(folder, root / "trash" / checkpoint_id) and checkpoint_id in wanted:
            bring_back(root, checkpoint_id, "something refers to it")


def left_by_purges(root: Path) -> list[tuple[Path, bool]]:
    """Folders that a purge, killed or still at work, was about to delete, and whether they are recorded as purged."""
    names = [name for name in _names(root / "trash") if name.startswith(PURGED) and is_id(name.removeprefix(PURGED))]
    return [(root / "trash" / name, last_event(root, name.removeprefix(PURGED)).get("event") == "purged") for name in names]


def leftovers(root: Path, older_than: timedelta, at: datetime) -> tuple[list[Path], list[Path]]:
    """What killed writers left anywhere in the registry: what may be removed, and what is kept because its writer may live."""
    gone: list[Path] = []
    kept: list[Path] = []
    for folder, below, files in os.walk(root):
        drafts = [name for name in (*below, *files) if name.startswith(".tmp-")]
        for name in sorted(drafts):
            (gone if is_leftover(name, older_than, at) else kept).append(Path(folder) / name)
        inside = {root / "checkpoints": [], root / "trash": [RECORDS]}.get(Path(folder), below)  # published folders are not looked into
        below[:] = [name for name in inside if name in below and not name.startswith(".tmp-")]
    return gone, kept


def remove(paths: Iterable[Path]) -> None:
    """Delete leftovers. A folder is renamed first: a writer that should live after all fails cleanly instead of publishing half of it."""
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            aside = path.with_name(draft_name())
            if _move(path, aside):
                shutil.rmtree(aside, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _move(source: Path, target: Path) -> bool:
    durable_mkdir(target.parent)
    try:
        durable_move(source, target)
    except FileNotFoundError:
        return False
    return True


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except FileNotFoundError:
        return []
