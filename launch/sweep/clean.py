"""What trials leave on the disk, bounded: no resumable state of those that are over, and published checkpoints of the best ones where that is asked."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Iterable
from pathlib import Path

from launch.chain.decide import read_json
from stages.claim import Claim, is_alive


def drop_state(folder: Path) -> None:
    """Remove what a trial that is over would resume from; its logs, metrics and configs stay."""
    shutil.rmtree(folder / "previous", ignore_errors=True)
    for state in folder.glob("*/resume"):
        shutil.rmtree(state, ignore_errors=True)


def is_left(folder: Path) -> bool:
    """Whether a process of an earlier sweep, which is dead, still saves in a trial's folder.

    Only for who holds the sweep's lock: a claim from another machine is then one that nobody has, and goes.
    """
    for place in (folder, *(path.parent for path in folder.glob("*/.lock"))):
        found = Claim(place, "align sweep").holder()
        if found is None:
            continue
        claim, holder = found
        if holder.get("host") != platform.node():
            claim.unlink(missing_ok=True)
        elif is_alive(holder):
            return True
    return False


def drop_made(folder: Path, root: Path) -> list[str]:
    """Delete what the steps of a trial that was ended early have published: nobody goes on from it. Returns the ids of those that went."""
    steps = read_json(folder / "chain.json").get("steps", {})
    refs = {step["checkpoint"] for step in steps.values() if isinstance(step, dict) and step.get("checkpoint")}
    if not refs:
        return []
    from stages.registry import Registry

    return drop_checkpoints(root, [checkpoint.id for checkpoint in Registry(root, create=False).list() if checkpoint.ref in refs])


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
