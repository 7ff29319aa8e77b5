"""What a file system does of what a registry needs: each operation is tried in a folder of its own, which is removed again.

A probe shows that the operation works and is refused where it must be. That fsync really reaches the disk no program can see.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from configs.errors import UserError
from stages.registry.holder import draft_name
from stages.registry.storage import fsync_dir, fsync_file, reflink


@dataclass(frozen=True)
class Probe:
    """One operation. needed: whether a registry can't do without it. means: what it is for, or what its absence costs."""

    name: str
    works: bool
    needed: bool
    means: str
    milliseconds: float
    problem: str | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def examine(folder: Path) -> list[Probe]:
    """Try every operation on the file system that `folder` is on, or the nearest folder above it that exists. Leaves nothing behind.

    Raises UserError when nothing can be written there.
    """
    place = folder.expanduser().absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    scratch = place / draft_name()
    try:
        scratch.mkdir()
    except OSError as error:
        raise UserError(f"{place} can't be written ({error.strerror}), so no registry can be kept there; check its owner and how it is mounted, or name another folder") from error
    try:
        return [_try(scratch / str(number), *probe) for number, probe in enumerate(PROBES)]
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _try(folder: Path, name: str, needed: bool, probe: Callable[[Path], None], works: str, fails: str) -> Probe:
    began = time.monotonic()
    problem = None
    try:
        folder.mkdir()
        probe(folder)
    except OSError as error:
        problem = f"{errno.errorcode[error.errno]}: {error.strerror}" if error.errno and error.errno in errno.errorcode else str(error.strerror or error)
    return Probe(name, problem is None, needed, works if problem is None else fails, round((time.monotonic() - began) * 1e3, 2), problem)


def _write(path: Path, content: bytes = b"a page" * 1000) -> Path:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        os.write(handle, content)
    finally:
        os.close(handle)
    return path


def _demand(condition: bool, told: str) -> None:
    if not condition:
        raise OSError(0, told)


def _rename(folder: Path) -> None:
    """A folder with a file in it appears under its new name at once, and not over a folder that holds something."""
    first, second = folder / "first", folder / "second"
    for path in (first, second):
        path.mkdir()
        _write(path / "file")
    try:
        os.rename(first, second)
    except OSError as error:
        _demand(error.errno in (errno.ENOTEMPTY, errno.EEXIST), f"a rename over a full folder failed in another way ({error.strerror})")
    else:
        raise OSError(0, "a folder took the place of another one that was not empty")
    os.rename(first, folder / "third")
    _demand((folder / "third" / "file").is_file() and not first.exists(), "the renamed folder is not where it should be")


def _link(folder: Path) -> None:
    """A second name, and a refusal where the name is taken: of two writers exactly one gets the number."""
    first = _write(folder / "first")
    os.link(first, folder / "second")
    _demand(os.stat(first).st_nlink == 2, "a hard link does not show in the count of links")
    _write(folder / "third")
    try:
        os.link(folder / "third", folder / "second")
    except FileExistsError:
        return
    raise OSError(0, "link(2) replaced a file that was there")


def _exclusive(folder: Path) -> None:
    _write(folder / "file")
    try:
        _write(folder / "file")
    except FileExistsError:
        return
    raise OSError(0, "a file that was there was created once more")


def _reflink(folder: Path) -> None:
    first = _write(folder / "first", os.urandom(65536))
    _demand(reflink(first, folder / "second"), "the file system shares no blocks between files")
    _demand((folder / "second").read_bytes() == first.read_bytes(), "a reflink holds something else than its source")


def _fsync_file(folder: Path) -> None:
    fsync_file(_write(folder / "file"))


def _fsync_folder(folder: Path) -> None:
    _write(folder / "file")
    fsync_dir(folder)


def _locks(folder: Path) -> None:
    with open(_write(folder / "file"), "rb+") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)


PROBES: tuple[tuple[str, bool, Callable[[Path], None], str, str], ...] = (
    ("rename of a folder", True, _rename, "a checkpoint appears whole, by one rename", "checkpoints could appear in part: keep the registry elsewhere"),
    ("hard link", True, _link, "aliases and version numbers are claimed by exactly one writer; identical files are stored once",
     "two writers could claim one number, and no alias can be moved: keep the registry elsewhere"),
    ("exclusive create", True, _exclusive, "no writer overwrites another one's file", "writers could overwrite one another: keep the registry elsewhere"),
    ("fsync of a file", True, _fsync_file, "contents are asked to reach the disk before a checkpoint is acknowledged", "a power cut could empty published files: keep the registry elsewhere"),
    ("fsync of a folder", True, _fsync_folder, "names are asked to reach the disk before a checkpoint is acknowledged", "a power cut could undo a publication: keep the registry elsewhere"),
    ("reflink", False, _reflink, "identical files share their blocks, and a change of one leaves the other alone", "identical files are stored once as hard links instead"),
    ("flock", False, _locks, "present; the registry does not rely on it", "absent; the registry does not rely on it"),
)  # fmt: skip
