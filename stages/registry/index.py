"""What the manifests say, kept in a SQLite file on a local disk, so that a registry of thousands is listed without reading them all.

Never the truth: every scan lists the checkpoints' folder and takes from the index only what is there, so that what another process
published or removed is seen at once; of the rest it reads the manifests. These never change, so a row stays right. `strict` finds those that
somebody changed all the same (by the status of the file); `Registry.resolve` and `verify` read the manifest itself in any case.

A missing, damaged, locked or foreign index costs time and nothing else: its listing carries a BLAKE3, and what fails is thrown away and
built anew. SQLite is unsafe on network file systems, so the file lies in the cache folder of this machine (see `place`), under a key of the
registry's path and id. Registries below SMALL checkpoints have none: reading their manifests takes milliseconds.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import closing
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from configs.errors import UserError
from stages.registry.integrity import Problem, read_checkpoint
from stages.registry.manifest import MANIFEST, Checkpoint
from stages.registry.names import is_id
from stages.registry.place import index_file
from stages.registry.sealing import hash_bytes
from stages.registry.sharing import Holders, find_in

if TYPE_CHECKING:
    import sqlite3

SMALL = 200  # checkpoints
_LOCKED = 0.5  # seconds to wait for another process that writes the index, before going on without
_TABLES = (
    "CREATE TABLE IF NOT EXISTS listing (one INTEGER PRIMARY KEY CHECK (one = 1), body BLOB NOT NULL, hash TEXT NOT NULL)",
    "CREATE TABLE IF NOT EXISTS files (key INTEGER NOT NULL, id TEXT NOT NULL, PRIMARY KEY (key, id)) WITHOUT ROWID",
)


class Row(NamedTuple):
    """One checkpoint in the listing."""

    stage: str
    name: str
    version: int
    id: str
    created: str
    bytes: int
    parents: str  # JSON, read when asked for
    status: str  # of the manifest file: bytes, inode, times of change


class Indexed(Checkpoint):
    """A checkpoint whose manifest is read when something is asked that the listing does not hold."""

    @classmethod
    def of(cls, row: Row, checkpoints: str) -> Indexed:
        """From a row and the folder that holds all checkpoints."""
        item = object.__new__(cls)
        vars(item).update(id=row[3], stage=row[0], name=row[1], version=row[2], _row=row, _checkpoints=checkpoints)
        return item

    @cached_property
    def path(self) -> Path:
        return Path(vars(self)["_checkpoints"], self.id)

    @cached_property
    def manifest(self) -> Mapping[str, Any]:
        row: Row = vars(self)["_row"]
        known = {"id": row.id, "stage": row.stage, "name": row.name, "version": row.version, "created": row.created}
        return _Record({**known, "parents": json.loads(row.parents)}, self.path)

    @property
    def size(self) -> int:
        return vars(self)["_row"].bytes


class _Record(Mapping[str, Any]):
    """A manifest of which some entries are known and the rest is read when it is wanted."""

    def __init__(self, known: dict[str, Any], path: Path) -> None:
        self._known, self._path = known, path

    @cached_property
    def _whole(self) -> Mapping[str, Any]:
        found = read_checkpoint(self._path)
        if isinstance(found, Problem):
            raise UserError(f"{self._path} is damaged: {found}")
        return found.manifest

    def __getitem__(self, key: str) -> Any:
        return self._known[key] if key in self._known else self._whole[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._whole)

    def __len__(self) -> int:
        return len(self._whole)


def scan(root: Path, *, strict: bool = False) -> dict[str, Checkpoint | Problem]:
    """Every checkpoint of a registry by id, by stage, name and version; then what is wrong with the manifests of the others.

    strict: look at each manifest's status too, and read again those that changed since they were indexed.
    """
    checkpoints = str(root / "checkpoints")
    try:
        names = os.listdir(checkpoints)
    except FileNotFoundError:
        return {}
    if len(names) < SMALL:
        found = _read(checkpoints, sorted(names))
        sound = sorted((item for item in found.values() if isinstance(item, Checkpoint)), key=lambda item: (item.stage, item.name, item.version))
        return {item.id: item for item in sound} | {key: item for key, item in found.items() if isinstance(item, Problem)}
    return _scan_large(root, checkpoints, names, strict)


def _scan_large(root: Path, checkpoints: str, names: list[str], strict: bool) -> dict[str, Checkpoint | Problem]:
    file = index_file(root)
    rows = _load(file)
    there = set(names)
    kept = [row for row in rows if row[3] in there and not (strict and _status(checkpoints, row[3]) != row[7])]
    known = {row[3] for row in kept}
    read = _read(checkpoints, sorted(name for name in names if name not in known))
    fresh = [item for item in read.values() if isinstance(item, Checkpoint)]
    if fresh:
        kept = sorted([*kept, *(_row(item, checkpoints) for item in fresh)])
    if fresh or len(kept) != len(rows):
        _store(file, kept, fresh, gone=[row[3] for row in rows if row[3] not in known])
    found: dict[str, Checkpoint | Problem] = {row[3]: Indexed.of(row, checkpoints) for row in kept}
    return found | {key: item for key, item in read.items() if isinstance(item, Problem)}


def holders(root: Path) -> Holders:
    """Finds files by size and BLAKE3 in all checkpoints of a small registry, in those the index knows of a large one (it is not brought up
    to date here: what it misses is stored a second time, and no publication waits for a scan)."""
    checkpoints = str(root / "checkpoints")
    names = os.listdir(checkpoints)
    few = find_in([item for item in _read(checkpoints, names).values() if isinstance(item, Checkpoint)]) if len(names) < SMALL else None

    def look(size: int, digest: str) -> Iterator[tuple[Path, str]]:
        if few is not None:
            yield from few(size, digest)
            return
        for owner in _owners(index_file(root), digest):
            for item in _read(checkpoints, [owner]).values():
                yield from find_in([item] if isinstance(item, Checkpoint) else [])(size, digest)

    return look


def _owners(file: Path, digest: str) -> list[str]:
    import sqlite3

    if not file.is_file():
        return []
    try:
        with closing(_open(file)) as database:
            return [str(row[0]) for row in database.execute("SELECT id FROM files WHERE key = ? ORDER BY id DESC LIMIT 32", (_key(digest),))]
    except sqlite3.Error:
        return []


def _read(checkpoints: str, names: list[str]) -> dict[str, Checkpoint | Problem]:
    found: dict[str, Checkpoint | Problem] = {}
    for name in names:
        if is_id(name):
            item = read_checkpoint(Path(checkpoints, name))
            if isinstance(item, Checkpoint) or os.path.isdir(f"{checkpoints}/{name}"):  # else it was removed meanwhile
                found[name] = item
    return found


def _row(item: Checkpoint, checkpoints: str) -> Row:
    facts = item.manifest
    parents = json.dumps(facts.get("parents", []))
    return Row(item.stage, item.name, item.version, item.id, str(facts.get("created")), item.size, parents, _status(checkpoints, item.id))


def _status(checkpoints: str, checkpoint_id: str) -> str:
    """What changes when a file is written, replaced or restored."""
    try:
        found = os.stat(f"{checkpoints}/{checkpoint_id}/{MANIFEST}")
    except OSError:
        return "gone"
    return f"{found.st_size} {found.st_ino} {found.st_mtime_ns} {found.st_ctime_ns}"


def _open(file: Path) -> sqlite3.Connection:
    import sqlite3

    database = sqlite3.connect(file, timeout=_LOCKED, isolation_level=None)
    database.execute("PRAGMA journal_mode = MEMORY")  # no second file; a writer that dies leaves what the hash or SQLite refuses
    database.execute("PRAGMA synchronous = OFF")
    return database


def _load(file: Path) -> list[Row]:
    """The listing; [] where there is none or it is not whole."""
    import sqlite3

    if not file.is_file():
        return []
    try:
        with closing(_open(file)) as database:
            found = database.execute("SELECT body, hash FROM listing").fetchone()
        if found is None or hash_bytes(found[0]) != found[1]:
            return []
        return list(map(Row._make, zip(*json.loads(found[0]), strict=True)))
    except (sqlite3.Error, OSError, TypeError):
        return []


def _store(file: Path, rows: list[Row], fresh: list[Checkpoint], gone: list[str]) -> None:
    """Keep the listing, and where the files of `fresh` are found; a file that is no sound index is begun anew, any other trouble ignored."""
    import sqlite3

    body = json.dumps(list(zip(*rows, strict=True)), separators=(",", ":")).encode()
    keys = sorted((_key(entry["blake3"]), item.id) for item in fresh for entry in item.manifest["files"].values())
    for _ in range(2):
        try:
            file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with closing(_open(file)) as database:
                database.execute("BEGIN IMMEDIATE")
                for table in _TABLES:
                    database.execute(table)
                database.executemany("DELETE FROM files WHERE id = ?", [(item,) for item in gone])
                database.executemany("INSERT OR IGNORE INTO files VALUES (?, ?)", keys)
                database.execute("INSERT OR REPLACE INTO listing VALUES (1, ?, ?)", (body, hash_bytes(body)))
                database.execute("COMMIT")
            return
        except (sqlite3.OperationalError, OSError):  # locked, full, not ours to write
            return
        except sqlite3.DatabaseError:  # not a database, or a damaged one
            file.unlink(missing_ok=True)


def _key(digest: str) -> int:
    """63 bits of a hash: what is found is compared whole, and read before it is shared."""
    return int(digest[:16], 16) >> 1
