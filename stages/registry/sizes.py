"""How much of the disk checkpoints really take: what several of them share counts once, for the first."""

from __future__ import annotations

import os
from collections.abc import Iterable

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
