"""A model of power cuts: from the calls of a program, the disks that a crash may leave.

What is lost: the content of a file since its last fsync (lost, torn, or zeros of the right length), and each change of a folder's entries since
the last fsync of that folder (create, link, unlink, rename: each of them independently of the others, so in any order). A rename is one change,
as journaling file systems have it, until one of its two folders is synced: then that half of it is durable and the other may still be lost.
Stricter than most disks: an fsync of a file does not make its name durable, and an fsync of one folder none of another's entries.

Every call is followed by a look at the whole tree, so that what compiled code writes is seen too, before the next call.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults.promises import Promises
from tests.faults.shim import Call, Hook

Key = tuple[int, int]  # inode and how often its number was used before
TOP: Key = (-1, 0)
HELPERS = (" fsync_dir", " fsync_file", " sync_names", " _sync_name", " sync_folder", " _sync")  # functions that only perform an fsync


@dataclass(frozen=True)
class Change:
    """Entries of folders that change together: (folder, name, what the name means afterwards or None). What is of one folder is durable once that is synced."""

    entries: tuple[tuple[Key, str, Key | None], ...]


@dataclass
class Disk:
    """What is durable, and what is not yet."""

    entries: dict[Key, dict[str, Key]] = field(default_factory=dict)  # durable entries of each folder
    content: dict[Key, bytes] = field(default_factory=dict)  # durable content of each file; absent: none
    pending: list[Change] = field(default_factory=list)
    unsynced: dict[Key, list[bytes]] = field(default_factory=dict)  # contents since the last fsync, oldest first
    folders: frozenset[Key] = frozenset()

    def copy(self) -> Disk:
        return Disk(
            {key: dict(item) for key, item in self.entries.items()}, dict(self.content), list(self.pending),
            {key: list(item) for key, item in self.unsynced.items()}, self.folders,
        )  # fmt: skip


@dataclass(frozen=True)
class Point:
    """A moment at which power may fail: after `call`, with what had been acknowledged by then."""

    call: str
    disk: Disk
    promises: Promises


class Recorder(Hook):
    """Follows a program through the shim; `top` is the folder around the registry. skip: the fsyncs of this site do nothing."""

    def __init__(self, top: Path, promises: Promises, skip: str | None = None) -> None:
        self.top, self.promises, self.skip = top, promises, skip
        self.used: dict[int, int] = {}
        self.present: set[int] = set()
        self.points: list[Point] = []
        self.syncs: list[str] = []  # the sites of all fsyncs
        self.tree, self.files = self._look()
        folders = frozenset(self.tree)
        self.disk = Disk({key: dict(item) for key, item in self.tree.items()}, dict(self.files), folders=folders)

    def _key(self, path: str | int) -> Key:
        number = os.stat(path, follow_symlinks=False).st_ino
        return (number, self.used.get(number, 0))

    def _look(self) -> tuple[dict[Key, dict[str, Key]], dict[Key, bytes]]:
        tree: dict[Key, dict[str, Key]] = {}
        where: dict[Key, str] = {}
        waiting, seen = [(TOP, str(self.top))], set()
        while waiting:
            key, folder = waiting.pop()
            tree[key] = {}
            for entry in os.scandir(folder):
                number = entry.inode()
                seen.add(number)
                below = (number, self.used.get(number, 0))
                tree[key][entry.name] = below
                if entry.is_dir(follow_symlinks=False):
                    waiting.append((below, entry.path))
                else:
                    where[below] = entry.path
        for gone in self.present - seen:  # its number may be used again, for another file
            self.used[gone] = self.used.get(gone, 0) + 1
        self.present = seen
        return tree, {key: _content(path) for key, path in where.items()}

    def before(self, index: int, call: Call) -> int | None:
        return None

    def after(self, index: int, call: Call) -> None:
        if call.name == "read":
            return
        tree, files = self._look()
        self._entries(call, tree)
        for key, content in files.items():
            if content != (self.disk.unsynced[key][-1] if key in self.disk.unsynced else self.disk.content.get(key)):
                self.disk.unsynced.setdefault(key, []).append(content)
        self.tree, self.files = tree, files
        self.disk.folders = self.disk.folders | frozenset(tree)
        if call.name in ("fsync", "fdatasync"):
            self.syncs.append(sync_site(call))
            if self.syncs[-1] != self.skip:
                self._synced(call.paths[0])
        self.points.append(Point(str(call), self.disk.copy(), self.promises.copy()))

    def _entries(self, call: Call, tree: dict[Key, dict[str, Key]]) -> None:
        changes = []
        for folder in tree.keys() | self.tree.keys():
            old, new = self.tree.get(folder, {}), tree.get(folder)
            if new is None:
                continue  # removed with its folder
            changes += [(folder, name, new.get(name)) for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
        if call.name in ("rename", "replace") and len(changes) == 2:
            self.disk.pending.append(Change(tuple(changes)))
        else:
            self.disk.pending += [Change((change,)) for change in changes]

    def _synced(self, path: str) -> None:
        key = TOP if path == os.path.realpath(self.top) else self._key(path) if os.path.lexists(path) else None
        if key is None:
            return
        if key in self.files:
            self.disk.content[key] = self.files[key]
            self.disk.unsynced.pop(key, None)
            return
        still = []
        for change in self.disk.pending:
            here = tuple(entry for entry in change.entries if entry[0] == key)
            _apply(self.disk.entries, Change(here))
            still.append(Change(tuple(entry for entry in change.entries if entry not in here)))
        self.disk.pending = [change for change in still if change.entries]

    def acknowledged(self) -> None:
        """A point of its own for what has just been acknowledged."""
        self.points.append(Point("acknowledged", self.disk.copy(), self.promises.copy()))


def sync_site(call: Call) -> str:
    """The line of the code that asks for an fsync: not the helper that performs it, whoever calls that."""
    frames = [item for item in call.site if not item.endswith(HELPERS)]
    return " < ".join(reversed(frames[-2:] if frames[-1].endswith(" write_exclusive") else frames[-1:])) if frames else ""


def _content(path: str) -> bytes:
    handle = os.open(path, os.O_RDONLY)
    try:
        return os.read(handle, 2**26)
    finally:
        os.close(handle)


def _apply(entries: dict[Key, dict[str, Key]], change: Change) -> None:
    for folder, name, key in change.entries:
        here = entries.setdefault(folder, {})
        if key is None:
            here.pop(name, None)
        else:
            here[name] = key


@dataclass(frozen=True)
class Outcome:
    """One disk after a crash: which changes got there, and the content of each file that was not synced."""

    kept: tuple[bool, ...]
    contents: tuple[tuple[Key, bytes], ...]


def outcomes(disk: Disk, most: int, chance: random.Random) -> Iterator[Outcome]:
    """All of them where there are at most `most`; else the corners (all, none, all but one, one alone) and a sample."""
    keys = sorted(disk.unsynced)
    options = [_contents(disk, key, chance) for key in keys]
    count = 2 ** len(disk.pending)
    for item in options:
        count *= len(item)

    def made(kept: tuple[bool, ...], picked: tuple[bytes, ...]) -> Outcome:
        return Outcome(kept, tuple(zip(keys, picked, strict=True)))

    if count <= most:
        for kept in itertools.product((True, False), repeat=len(disk.pending)):
            for picked in itertools.product(*options):
                yield made(kept, picked)
        return
    everything, nothing = (True,) * len(disk.pending), (False,) * len(disk.pending)
    newest = tuple(item[0] for item in options)
    for index in range(max(len(item) for item in options) if options else 1):
        yield made(everything, tuple(item[index % len(item)] for item in options))
    yield made(nothing, newest)
    for index in range(len(disk.pending)):
        yield made((*everything[:index], False, *everything[index + 1 :]), newest)
        yield made((*nothing[:index], True, *nothing[index + 1 :]), newest)
    for _ in range(most // 2):
        rate = chance.choice((0.2, 0.5, 0.8))
        yield made(tuple(chance.random() < rate for _ in everything), tuple(chance.choice(item) for item in options))


def _contents(disk: Disk, key: Key, chance: random.Random) -> list[bytes]:
    """The newest content first; then what the last fsync left, zeros of the right length, torn ones, and what was there in between."""
    newest = disk.unsynced[key][-1]
    cut = chance.randrange(len(newest)) if newest else 0
    torn = [newest[:cut], newest[:cut] + bytes(len(newest) - cut)] if newest else []
    found = [newest, disk.content.get(key, b""), bytes(len(newest)), *torn, *disk.unsynced[key][:-1]]
    return list(dict.fromkeys(found))


def build(disk: Disk, outcome: Outcome, top: Path, known: set[bytes] | None = None) -> bool:
    """Make that disk at `top`; False when `known` holds the same one already (nothing is made then)."""
    entries = {folder: dict(item) for folder, item in disk.entries.items()}
    for change, kept in zip(disk.pending, outcome.kept, strict=True):
        if kept:
            _apply(entries, change)
    contents = {**disk.content, **dict(outcome.contents)}
    listing: list[tuple[str, Key, bytes | None]] = []
    waiting = [("", TOP)]
    while waiting:
        path, folder = waiting.pop()
        for name, key in sorted(entries.get(folder, {}).items()):
            below = f"{path}{name}"
            is_folder = key in disk.folders
            listing.append((below, key, None if is_folder else contents.get(key, b"")))
            if is_folder:
                waiting.append((f"{below}/", key))
    if known is not None:
        digest = hashlib.sha256(repr([(path, key, hash(content)) for path, key, content in listing]).encode()).digest()
        if digest in known:
            return False
        known.add(digest)
    shutil.rmtree(top, ignore_errors=True)
    top.mkdir()
    made: dict[Key, Path] = {}
    for path, key, content in listing:
        if content is None:
            (top / path).mkdir()
        elif key in made:
            os.link(made[key], top / path)
        else:
            made[key] = top / path
            (top / path).write_bytes(content)
    return True
