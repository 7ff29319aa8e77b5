"""Identical files are stored once: a new file that an older checkpoint holds already becomes a reflink of it, else a hard link, else stays a copy.

A reflink (btrfs, XFS, NFS 4.2) shares blocks and nothing else. A hard link is the same file under two names: written in place, it would
change in both checkpoints. That is why published files are read-only: an editor, `open(…, "w")` or a stray save is refused, and tools that
replace a file (write beside it, then rename) change one checkpoint only. It does not stop root, nor who changes the mode first, nor a bad
block: the deep check finds those in both. Deleting one checkpoint takes one name away and leaves the other whole.

Nothing here is visible: it happens in the staging folder, before the manifest is written. What was linked is hashed through its new name,
so that the content of a damaged checkpoint is never taken over.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

from stages.registry.manifest import Checkpoint
from stages.registry.sealing import hash_bytes, hash_file
from stages.registry.storage import hardlink, protect, reflink, replace

Holders = Callable[[int, str], Iterable[tuple[Path, str]]]  # (bytes, BLAKE3) -> files that should hold just that, each with its origin
_TRIES = 4  # candidates looked at per file: each is read whole


def share(staging: Path, files: dict[str, dict[str, Any]], holders: Holders) -> None:
    """Replace files of a staging folder by ones that older checkpoints hold.

    files: relative path -> {"size", "blake3"} of what lies there; a reflink is noted as "reflink_of", its origin: id/path of the first that held
    these blocks, since nothing else tells it from a copy (a hard link shows in the inode). Raises OSError for faults of the disk only.
    """
    can_reflink = True
    for name, entry in files.items():
        if not entry["size"]:
            continue
        draft = (staging / name).with_name(f".shared-{hash_bytes(name.encode())[:16]}")
        found = holders(entry["size"], entry["blake3"])
        for source, origin in islice((item for item in found if _usable(item[0], entry["size"])), _TRIES):
            reflinked = can_reflink and reflink(source, draft)
            can_reflink = reflinked
            if not reflinked and not hardlink(source, draft):
                continue
            if not _sound(draft, entry["blake3"]):
                draft.unlink()
                continue
            replace(draft, staging / name)
            if reflinked:
                entry["reflink_of"] = origin
            break


def find_in(near: Sequence[Checkpoint], far: Callable[[], Holders] | None = None) -> Holders:
    """Looks among the checkpoints of `near` in their order, then wherever `far()`, called at most once, looks; each file comes once."""
    elsewhere = cache(far) if far is not None else None
    known: dict[tuple[int, str], list[tuple[Path, str]]] = {}
    for checkpoint in near:
        for name, entry in checkpoint.manifest["files"].items():
            origin = entry.get("reflink_of", f"{checkpoint.id}/{name}")
            known.setdefault((entry["size"], entry["blake3"]), []).append((checkpoint.path / name, origin))

    def holders(size: int, digest: str) -> Iterator[tuple[Path, str]]:
        yield from (first := dict.fromkeys(known.get((size, digest), ())))
        if elsewhere is not None:
            yield from (found for found in elsewhere()(size, digest) if found not in first)

    return holders


def _usable(source: Path, size: int) -> bool:
    try:
        status = os.lstat(source)
        return stat.S_ISREG(status.st_mode) and status.st_size == size and os.access(source, os.R_OK)
    except OSError:  # removed or damaged since its manifest was read
        return False


def _sound(draft: Path, digest: str) -> bool:
    """Whether the linked file holds what it should and can be protected; a source that can't be read is no fault of this checkpoint."""
    try:
        protect(draft)
        return hash_file(draft) == digest
    except OSError:
        return False
