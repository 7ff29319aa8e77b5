"""A checkpoint leaves the registry as a folder that stands on its own: weights, tokenizer, card, checksums.

Everything is written to a folder beside the target and appears there by one rename, or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.errors import UserError
from stages.registry.card import Facts, card, public
from stages.registry.holder import draft_name
from stages.registry.loading import BASE
from stages.registry.manifest import MODEL, Checkpoint
from stages.registry.sealing import CHUNK, hash_file
from stages.registry.storage import check_room, durable_move, fsync_dir, readable, storage_error, write_exclusive

if TYPE_CHECKING:
    from stages.registry.registry import Registry

CARD, SUMS, ADAPTER = "README.md", "SHA256SUMS", "adapter_config.json"
NOTHING, ELSEWHERE = "Nothing was exported.", "another folder"
Say = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """merge: put an adapter into its base. dtype: of merged weights, float32 or bfloat16. licence: for the card, when the checkpoint records none.
    samples: a samples.jsonl of `align eval --output`. name: what the model is called on the hub."""

    merge: bool = False
    dtype: str = "float32"
    licence: str | None = None
    samples: Path | None = None
    name: str | None = None


@dataclass(frozen=True)
class Exported:
    """What was written. files: path -> bytes. difference: of merged and unmerged logits; None where nothing was merged."""

    checkpoint: Checkpoint
    folder: Path
    files: dict[str, int]
    licence: str | None
    difference: float | None = None


def export(registry: Registry, ref: str, target: Path, options: Options | None = None, say: Say = lambda line: None) -> Exported:
    """Write a checkpoint to `target`, which must be empty or absent. Every byte is compared with the manifest on its way.

    Raises UserError: a target that is not empty, a damaged checkpoint, --merge of what is no adapter, a full disk.
    """
    options = options or Options()
    target = target.expanduser().absolute()
    _refuse_occupied(target)
    checkpoint = registry.resolve(ref)
    adapter = is_adapter(checkpoint)
    if options.merge and not adapter:
        raise UserError(f"--merge: {checkpoint.ref} is no adapter, its weights are whole; leave --merge out")
    if options.dtype != "float32" and not options.merge:
        raise UserError(f"--dtype {options.dtype} is of merged weights; without --merge weights are exported as they were published: leave it out")
    samples = read_samples(options.samples) if options.samples else []
    staging, held = target.parent / draft_name(), None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        check_room(target.parent, checkpoint.size, NOTHING, ELSEWHERE)
        held = registry.lease(checkpoint, "align registry export")
        staging.mkdir()
        difference = _fill(registry, checkpoint, staging, options, adapter, say)
        weights = "merged" if options.merge else "adapter" if adapter else "whole"
        licence = options.licence or checkpoint.info("licence")
        facts = Facts(checkpoint, registry.lineage(checkpoint.id), registry.evaluations(checkpoint), weights, licence, samples, difference, options.name)
        write_exclusive(staging / CARD, card(facts).encode())
        files = _seal(staging)
        durable_move(staging, target)
    except BaseException as error:
        shutil.rmtree(staging, ignore_errors=True)
        if told := storage_error(error, f"exporting {checkpoint.ref} to {target}", NOTHING, ELSEWHERE):
            raise told from error
        raise
    finally:
        if held is not None:
            held.give_back()
    return Exported(checkpoint, target, files, licence, difference)


def is_adapter(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint holds an adapter rather than whole weights."""
    return f"{MODEL}/{ADAPTER}" in checkpoint.manifest["files"]


def _refuse_occupied(target: Path) -> None:
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise UserError(f"{target} is a file or a link; an export makes a folder: name another place")
    if target.is_dir() and any(target.iterdir()):
        raise UserError(f"{target} is not empty; name a new or empty folder: what lies there would be mixed with the model or lost")


def _fill(registry: Registry, checkpoint: Checkpoint, staging: Path, options: Options, adapter: bool, say: Say) -> float | None:
    """Put the model into the staging folder; the largest difference of logits where an adapter was merged."""
    if options.merge:
        from stages.merging import merge

        return merge(registry, checkpoint, staging, options.dtype, say)
    for name, entry in checkpoint.manifest["files"].items():
        if not name.startswith(f"{MODEL}/"):
            continue
        place = staging / Path(name).relative_to(MODEL)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(checkpoint.path / name, place)
        if hash_file(place) != entry["blake3"]:
            raise UserError(f"{checkpoint.ref} is damaged: {name} is not what was published. See all of it: align registry verify {checkpoint.ref} --deep --registry {registry.root}")
    if adapter:
        _name_base(staging, checkpoint, say)
    return None


def _name_base(folder: Path, checkpoint: Checkpoint, say: Say) -> None:
    """An exported adapter names its base, not a folder of this machine. Under a soft prompt it lies in `base`, if it is not whole weights there."""
    file = (folder / BASE if (folder / BASE).is_dir() else folder) / ADAPTER
    if not file.is_file():
        return
    facts = checkpoint.info("stage_info")["adapter"]
    base = public(str(facts["base"])) + (f" (its folder {facts['inside']})" if facts.get("inside") else "")
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(config | {"base_model_name_or_path": base}, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if facts.get("base_id") or base != facts["base"]:
        say(f"this is an adapter on {base}, which whoever loads it must have; export that too, or use --merge")


def _seal(folder: Path) -> dict[str, int]:
    """Write SHA256SUMS (`sha256sum -c` reads it), make everything durable; the files and their bytes."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sums = {str(path.relative_to(folder)): sha256(path) for path in files}
    for path in files:
        path.chmod(readable(path, path.stat().st_mode & 0o777))
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
    write_exclusive(folder / SUMS, "".join(f"{digest}  {name}\n" for name, digest in sums.items()).encode())
    for below, _, _ in os.walk(folder, topdown=False):
        fsync_dir(Path(below))
    return {name: (folder / name).stat().st_size for name in (*sums, SUMS)}


def sha256(path: Path) -> str:
    """SHA-256 of a file, 64 hex digits. Raises OSError."""
    hasher = hashlib.sha256()
    with open(path, "rb") as stream:
        while chunk := stream.read(CHUNK):
            hasher.update(chunk)
    return hasher.hexdigest()


def read_samples(file: Path, count: int = 8) -> Sequence[Mapping[str, Any]]:
    """The first rows of a samples.jsonl. Raises UserError."""
    try:
        with open(file, encoding="utf-8") as stream:
            rows = [json.loads(line) for line, _ in zip(stream, range(count), strict=False)]
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"--samples {file}: cannot be read ({error}); give the samples.jsonl that align eval --output wrote") from None
    if not rows or any(not isinstance(row, dict) or "completion" not in row for row in rows):
        raise UserError(f"--samples {file}: expected a JSON object with prompt and completion on every line")
    return rows
