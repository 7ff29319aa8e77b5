"""The record of a checkpoint: what it is, what it was made from, and which files it consists of."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from configs.errors import UserError
from stages.registry.names import is_name
from stages.registry.sealing import canonical, hash_bytes, hash_file

MANIFEST = "manifest.json"
MODEL = "model"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """One published result. Immutable: neither this object nor the files under `path` ever change; equal by id and path."""

    id: str
    stage: str
    name: str
    version: int
    path: Path  # ROOT/checkpoints/<id>
    manifest: Mapping[str, Any] = field(repr=False)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Checkpoint) and (self.id, self.path) == (other.id, other.path)

    def __hash__(self) -> int:
        return hash(self.id)

    @property
    def ref(self) -> str:
        """What a person types: `sft/demo@3`."""
        return f"{self.stage}/{self.name}@{self.version}"

    @property
    def model_dir(self) -> Path:
        """A plain Hugging Face folder."""
        return self.path / MODEL

    @property
    def manifest_hash(self) -> str:
        return self.manifest["hash"]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(entry["size"] for entry in self.manifest["files"].values())

    def info(self, key: str, default: Any = None) -> Any:
        """A copy of one entry of what the stage recorded (config, data, tokenizer, metrics, seed, stage_info …)."""
        return copy.deepcopy(self.manifest["info"].get(key, default))

    @property
    def parent_ids(self) -> list[str]:
        """Ids of what it was made from, in this registry."""
        return parent_ids(self.manifest)

    @classmethod
    def from_manifest(cls, path: Path, manifest: dict[str, Any]) -> Checkpoint:
        """From a manifest whose hash was checked. Raises ValueError when it does not describe the folder it lies in."""
        for key, kind in {"id": str, "stage": str, "name": str, "version": int, "files": dict, "info": dict}.items():
            if not isinstance(manifest.get(key), kind):
                raise ValueError(f"has no usable field {key!r}")
        for key in ("stage", "name"):
            if not is_name(manifest[key]):  # they become parts of paths and are printed
                raise ValueError(f"has the {key} {manifest[key]!r:.80}, which is no name")
        if not all(isinstance(entry, dict) and isinstance(entry.get("size"), int) for entry in manifest["files"].values()):
            raise ValueError("lists files without their sizes")
        if manifest["id"] != path.name:
            raise ValueError(f"describes checkpoint {manifest['id']}, not the folder it lies in")
        return cls(
            manifest["id"], manifest["stage"], manifest["name"], manifest["version"], path, MappingProxyType(manifest)
        )


@dataclass(frozen=True)
class Parent:
    """What a checkpoint was made from: another checkpoint (`id`, `manifest_hash`), or a model from outside
    (`source`: an absolute path or a hub name, `digest`: BLAKE3 over its files, None for a hub name)."""

    role: str  # init_from, reference, scorer, base …
    id: str | None = None
    manifest_hash: str | None = None
    ref: str | None = None  # what the checkpoint was called, shown when it is missing
    source: str | None = None
    digest: str | None = None

    @classmethod
    def of(cls, checkpoint: Checkpoint, role: str) -> Parent:
        """A parent in the registry."""
        return cls(role, checkpoint.id, checkpoint.manifest_hash, checkpoint.ref)

    @classmethod
    def external(cls, path_or_name: str | Path, role: str, digest: str | None = None) -> Parent:
        """A model from outside: a folder (its digest is computed unless given) or a hub name such as `org/model`.

        Raises UserError when it reads as a path and no such folder exists.
        """
        path = Path(path_or_name).expanduser()
        if path.is_dir():
            return cls(role, source=str(path.absolute()), digest=digest or folder_digest(path))
        if not _HUB_NAME.fullmatch(str(path_or_name)):
            raise UserError(f"parent {role}: {path_or_name} is neither a folder that exists nor a hub name (org/model)")
        return cls(role, source=str(path_or_name), digest=digest)

    def to_json(self) -> dict[str, str]:
        return {key: item for key, item in vars(self).items() if item is not None}

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Parent:
        """From a manifest; fields that later versions may add are left out."""
        return cls(**{key: entry[key] for key in cls.__dataclass_fields__ if key in entry})


def parent_ids(manifest: Mapping[str, Any]) -> list[str]:
    """Ids of what a manifest's checkpoint was made from, in its registry."""
    return [entry["id"] for entry in manifest.get("parents", []) if entry.get("id")]


def folder_digest(folder: Path) -> str:
    """BLAKE3 over the relative paths and contents of all files of a model folder (hidden files left out)."""
    files = {
        path.relative_to(folder).as_posix(): hash_file(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }
    return hash_bytes(canonical(files))
