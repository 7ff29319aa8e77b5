"""What trials leave on the disk, bounded: no resumable state of those that are over, and published checkpoints of the best ones where that is asked."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path


def drop_state(folder: Path) -> None:
    """Remove what a trial that is over would resume from; its logs, metrics and configs stay."""
    shutil.rmtree(folder / "previous", ignore_errors=True)
    for state in folder.glob("*/resume"):
        shutil.rmtree(state, ignore_errors=True)


def drop_checkpoints(root: Path, ids: Iterable[str]) -> list[str]:
    """Delete checkpoints of the sweep's registry for good, but for those that something refers to; returns the ids of those that went."""
    from stages.registry import Registry, gc, trash

    if not (root / "registry.json").is_file():
        return []
    registry = Registry(root, create=False)
    wanted = set(ids)
    going = [checkpoint for checkpoint in registry.list() if checkpoint.id in wanted]
    if not going:
        return []
    done = gc.apply(registry, gc.Plan(going=going))
    return trash.purge(registry.root, [checkpoint.id for checkpoint in done.trashed], lambda: gc.all_references(registry))
