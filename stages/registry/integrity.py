"""Is a checkpoint whole? Quick: the manifest's own hash, the exact set of files, their sizes. Deep: contents too."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from stages.registry.manifest import MANIFEST, Checkpoint
from stages.registry.sealing import hash_files, unseal


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a checkpoint: the file, relative to the checkpoint's folder, and what is wrong with it."""

    file: str
    what: str

    def __str__(self) -> str:
        return f"{self.file}: {self.what}"


def walk(folder: Path, prefix: str = "") -> Iterator[tuple[str, os.stat_result]]:
    """Every entry below a folder that is not a folder itself, by relative path, links not followed. Raises OSError."""
    for entry in sorted(os.scandir(folder), key=lambda item: item.name):
        name = f"{prefix}{entry.name}"
        if entry.is_dir(follow_symlinks=False):
            yield from walk(Path(entry.path), f"{name}/")
        else:
            yield name, entry.stat(follow_symlinks=False)


def read_checkpoint(path: Path) -> Checkpoint | Problem:
    """The checkpoint in a folder, or what is wrong with its manifest."""
    try:
        return Checkpoint.from_manifest(path, unseal((path / MANIFEST).read_bytes()))
    except FileNotFoundError:
        return Problem(MANIFEST, "is missing")
    except (OSError, ValueError) as error:
        return Problem(MANIFEST, str(error))


def check(path: Path, deep: bool = False) -> list[Problem]:
    """All problems of the checkpoint in a folder; [] when it is whole."""
    checkpoint = read_checkpoint(path)
    if isinstance(checkpoint, Problem):
        return [checkpoint]
    recorded = checkpoint.manifest["files"]
    try:
        found = {name: status for name, status in walk(path) if name != MANIFEST}
    except OSError as error:
        return [Problem(os.path.relpath(error.filename or path, path), f"cannot be listed: {error.strerror}")]
    problems = [Problem(name, "is missing") for name in sorted(recorded.keys() - found.keys())]
    problems += [Problem(name, "was not part of what was published") for name in sorted(found.keys() - recorded.keys())]
    whole = {}
    for name in sorted(recorded.keys() & found.keys()):
        if problem := _check_file(name, recorded[name], found[name]):
            problems.append(problem)
        else:
            whole[path / name] = found[name].st_size
    if deep:
        problems += [problem for file, digest in hash_files(whole).items() if (problem := _compare(path, file, digest, recorded))]
    return problems


def _check_file(name: str, entry: dict, status: os.stat_result) -> Problem | None:
    if not stat.S_ISREG(status.st_mode):
        return Problem(name, "is not a plain file any more")
    if status.st_size != entry["size"]:
        return Problem(name, f"has {status.st_size} bytes, {entry['size']} were published")
    return None


def _compare(path: Path, file: Path, digest: str | OSError, recorded: dict) -> Problem | None:
    name = file.relative_to(path).as_posix()
    if isinstance(digest, OSError):
        return Problem(name, f"cannot be read: {digest.strerror}")
    return None if digest == recorded[name]["blake3"] else Problem(name, "its content changed since it was published")
