"""A registry of thousands of checkpoints, written without their fsyncs: for measuring how it is read."""

from __future__ import annotations

import json
import os
from pathlib import Path

from stages.registry import Checkpoint, Registry
from stages.registry.ledger import entry_path
from stages.registry.sealing import seal
from tests.unit.registry_samples import publish

NAMES = 50  # over which the checkpoints are spread
_CONFIG = {f"setting_{number}": number * 0.5 for number in range(60)}  # about what a stage's config takes in a manifest


def fill(registry: Registry, count: int) -> Checkpoint:
    """Publish one checkpoint, then lay down `count` - 1 copies of its manifest with ids, names, versions and claims of their own."""
    model = publish(registry, "sft/real", config=_CONFIG, metrics={"loss": 1.0})
    body = {key: item for key, item in model.manifest.items() if key != "hash"}
    for number in range(count - 1):
        add(registry, body, number)
    return model


def add(registry: Registry, body: dict, number: int, tag: str = "0") -> str:
    """One more checkpoint without weights; its id."""
    checkpoint_id = f"20260101t{number:06d}-{tag * 4}{number:08x}"
    name, version = f"name-{number % NAMES:03d}", number // NAMES + 1
    facts = {"id": checkpoint_id, "stage": "sft", "name": name, "version": version, "created": body["created"]}
    folder = registry.root / "checkpoints" / checkpoint_id
    os.mkdir(folder)
    (folder / "manifest.json").write_bytes(seal(json.loads(json.dumps({**body, **facts}))))
    claim = entry_path(registry.root / "versions" / "sft" / name, version)
    claim.parent.mkdir(parents=True, exist_ok=True)
    claim.write_bytes(seal(facts))
    return checkpoint_id


def place_of(folder: Path) -> str:
    """A cache folder of its own, so that the user's stays as it is."""
    (folder / "cache").mkdir(exist_ok=True)
    return str(folder / "cache")
