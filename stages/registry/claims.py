"""Names and versions without a look at the manifests: ROOT/versions/<stage>/<name>/<number>.json says which checkpoint claimed which number.

Whoever publishes claims the number first, so every checkpoint has a claim; a claim may have no checkpoint (its publisher was killed, or the
checkpoint was removed). Where the claims are damaged or incomplete, the answer is None and the manifests, which are the truth, must be read.
"""

from __future__ import annotations

import os
from itertools import islice
from pathlib import Path

from configs.errors import UserError
from stages.registry import ledger
from stages.registry.names import is_id


def families(root: Path) -> list[str]:
    """Every stage/name that a number was claimed for, sorted."""
    try:
        stages = sorted(os.listdir(root / "versions"))
        return [f"{stage}/{name}" for stage in stages for name in sorted(os.listdir(root / "versions" / stage))]
    except (FileNotFoundError, NotADirectoryError):
        return []


def newest(root: Path, stage: str, name: str, count: int = 1) -> list[str] | None:
    """The ids of the newest checkpoints of a name, newest first; None when the claims can't tell."""
    folder = root / "versions" / stage / name
    numbers = ledger.numbers(folder)
    lost = not os.path.isdir(root / "versions")
    if lost or numbers != list(range(1, len(numbers) + 1)):  # one of those that are lost may be the newest
        return None
    try:
        claimed = (ledger.read(folder, number).get("id") for number in reversed(numbers))
        return list(islice((str(item) for item in claimed if _there(root, item)), count))
    except UserError:
        return None


def version(root: Path, stage: str, name: str, number: int) -> str | None:
    """The id of a version that is there; None when the claims can't tell."""
    try:
        claimed = ledger.read(root / "versions" / stage / name, number).get("id")
    except UserError:
        return None
    return str(claimed) if _there(root, claimed) else None


def _there(root: Path, checkpoint_id: object) -> bool:
    return isinstance(checkpoint_id, str) and is_id(checkpoint_id) and os.path.isdir(root / "checkpoints" / checkpoint_id)
