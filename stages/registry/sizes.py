"""How much of the disk checkpoints really take: what several of them share counts once, for the first."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress

from stages.registry.manifest import Checkpoint


def real_sizes(checkpoints: Iterable[Checkpoint]) -> dict[str, int]:
    """Checkpoint id -> bytes of its files that no checkpoint before it in the order given holds too.

    Hard links show in the inode; reflinks are known from the manifest, which says whose file they were made of.
    """
    seen: set[tuple[int, int] | str] = set()
    sizes = {}
    for checkpoint in checkpoints:
        own = 0
        for name, entry in checkpoint.manifest["files"].items():
            blocks: set[tuple[int, int] | str] = {entry.get("reflink_of", f"{checkpoint.id}/{name}")}
            try:
                status = os.lstat(checkpoint.path / name)
                blocks.add((status.st_dev, status.st_ino))
            except OSError:  # missing: `verify` tells
                continue
            if not blocks & seen:
                own += entry["size"]
            seen |= blocks
        sizes[checkpoint.id] = own
    return sizes


def freed(leaving: Iterable[Checkpoint], staying: Iterable[Checkpoint]) -> int:
    """Bytes that the disk has more when `leaving` are deleted: of a file with several names (hard links) only where all of them go, of blocks that are
    shared (reflinks) only where none of `staying` was made of the same."""
    shared = {entry.get("reflink_of", f"{item.id}/{name}") for item in staying for name, entry in item.manifest["files"].items()}
    names: Counter[tuple[int, int]] = Counter()
    found: dict[tuple[int, int], tuple[int, int, str]] = {}
    for item in leaving:
        for name, entry in item.manifest["files"].items():
            with suppress(OSError):
                status = os.lstat(item.path / name)
                names[status.st_dev, status.st_ino] += 1
                found[status.st_dev, status.st_ino] = status.st_nlink, entry["size"], entry.get("reflink_of", f"{item.id}/{name}")
    alone = {origin: size for inode, (links, size, origin) in found.items() if names[inode] >= links and origin not in shared}
    return sum(alone.values())
