"""What a checkpoint was made from, back to the models from outside, as a tree."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from stages.registry.integrity import Problem
from stages.registry.manifest import Checkpoint, Parent


@dataclass(frozen=True)
class LineageNode:
    """One model and what it was made from. A checkpoint that appears a second time is not unfolded again."""

    label: str  # sft/demo@3, a path or a hub name
    kind: Literal["checkpoint", "external", "missing", "damaged"]
    role: str | None = None  # what it was for its child; None at the root
    id: str | None = None
    digest: str | None = None  # hash of the manifest, or of the files of a model from outside
    note: str | None = None
    repeated: bool = False
    parents: tuple[LineageNode, ...] = ()

    def to_json(self) -> dict[str, Any]:
        facts = {key: item for key, item in vars(self).items() if item not in (None, False) and key != "parents"}
        return {**facts, "parents": [parent.to_json() for parent in self.parents]}

    def render(self) -> str:
        """A tree in plain text with box characters, the parents below each model."""
        return "\n".join(self._lines("", "", ""))

    def _lines(self, prefix: str, branch: str, indent: str) -> list[str]:
        role = f"{self.role}: " if self.role else ""
        kind = "" if self.kind == "checkpoint" else f" [{self.kind}]"
        identity = f"  {self.id}" if self.id else ""
        note = f"  ({self.note})" if self.note else "  (see above)" if self.repeated else ""
        lines = [f"{prefix}{branch}{role}{self.label}{kind}{identity}{note}"]
        for index, parent in enumerate(self.parents):
            last = index == len(self.parents) - 1
            lines += parent._lines(prefix + indent, "└─ " if last else "├─ ", "   " if last else "│  ")
        return lines


def trace(checkpoint: Checkpoint, load: Callable[[str], Checkpoint | Problem | None]) -> LineageNode:
    """The tree above a checkpoint. `load(id)` gives a checkpoint, what is wrong with it, or None when there is none."""
    return _node(checkpoint, None, None, load, set())


def ancestors(checkpoint: Checkpoint, load: Callable[[str], Checkpoint | Problem | None]) -> list[Checkpoint]:
    """The checkpoint and every one that it was made from, each once; those that are gone or damaged are left out."""
    found, waiting = {checkpoint.id: checkpoint}, [checkpoint]
    while waiting:
        for entry in waiting.pop().manifest.get("parents", []):
            parent = load(entry["id"]) if entry.get("id") not in (None, *found) else None
            if isinstance(parent, Checkpoint):
                found[parent.id] = parent
                waiting.append(parent)
    return list(found.values())


def _node(
    checkpoint: Checkpoint,
    role: str | None,
    note: str | None,
    load: Callable[[str], Checkpoint | Problem | None],
    seen: set[str],
) -> LineageNode:
    parents = [Parent.from_json(entry) for entry in checkpoint.manifest.get("parents", [])]
    repeated = checkpoint.id in seen and bool(parents)
    seen.add(checkpoint.id)
    above = () if repeated else tuple(_parent(parent, load, seen) for parent in parents)
    return LineageNode(
        checkpoint.ref, "checkpoint", role, checkpoint.id, checkpoint.manifest_hash, note, repeated, above
    )


def _parent(parent: Parent, load: Callable[[str], Checkpoint | Problem | None], seen: set[str]) -> LineageNode:
    if parent.id is None:
        return LineageNode(parent.source or "unknown", "external", parent.role, digest=parent.digest)
    found = load(parent.id)
    label = parent.ref or parent.id
    if found is None:
        return LineageNode(label, "missing", parent.role, parent.id, parent.manifest_hash, "not in this registry")
    if isinstance(found, Problem):
        return LineageNode(label, "damaged", parent.role, parent.id, parent.manifest_hash, str(found))
    changed = None if found.manifest_hash == parent.manifest_hash else "its manifest is not the one recorded here"
    return _node(found, parent.role, changed, load, seen)
