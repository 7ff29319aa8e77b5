"""The resumable state of published runs (optimizer, order of the data, random states), kept apart from their models.

It is several times the size of a model and is wanted for days, the model for years. A published checkpoint never changes, so its state is not inside it:

ROOT/resume/checkpoints/<checkpoint id>/{manifest.json, state/<save>/}    whole or absent, like a checkpoint; named after the one it made
ROOT/resume/trash/ …                                                      laid out, moved, brought back and purged like the registry's own
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from configs.errors import UserError
from stages.registry import trash
from stages.registry.holder import draft_name, staging_name
from stages.registry.integrity import check, read_checkpoint, walk
from stages.registry.manifest import MANIFEST, Checkpoint
from stages.registry.names import is_id, now
from stages.registry.sealing import hash_file, seal
from stages.registry.storage import (
    check_room,
    durable_mkdir,
    durable_move,
    fsync_dir,
    fsync_file,
    hardlink,
    protect_own,
    storage_error,
    write_exclusive,
)

if TYPE_CHECKING:
    from stages.registry.registry import Registry

STATE = "state"


def root_of(registry: Registry) -> Path:
    """The folder that holds resumable states, laid out like a registry."""
    return registry.root / "resume"


def keep(registry: Registry, checkpoint: Checkpoint, save: Path) -> None:
    """Keep a save (a sealed folder that a stage resumes from) beside the checkpoint that its run has published.

    Files are linked where both lie on one file system, else copied. Raises UserError: a full disk, a registry that can't be written.
    """
    folder = root_of(registry) / "checkpoints"
    staging = folder / staging_name(checkpoint.id)
    try:
        durable_mkdir(folder)
        check_room(folder, sum(status.st_size for _, status in walk(save)), "The state was not kept.")
        place = staging / STATE / save.name
        place.mkdir(parents=True)
        for name, _ in walk(save):
            target = place / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if not hardlink(save / name, target):
                shutil.copyfile(save / name, target)
        files = {name: {"size": status.st_size, "blake3": hash_file(staging / name)} for name, status in walk(staging)}
        for name in files:
            protect_own(staging / name)
            fsync_file(staging / name)
        for below, _, _ in os.walk(staging, topdown=False):
            fsync_dir(Path(below))
        facts = {"id": checkpoint.id, "stage": checkpoint.stage, "name": checkpoint.name, "version": checkpoint.version, "created": now()}
        write_exclusive(staging / MANIFEST, seal({**facts, "format": 1, "of": checkpoint.manifest_hash, "files": files, "info": {}}))
        fsync_dir(staging)
        durable_move(staging, folder / checkpoint.id)
    except BaseException as error:
        shutil.rmtree(staging, ignore_errors=True)
        if told := storage_error(error, f"keeping the resumable state of {checkpoint.ref}"):
            raise told from error
        raise


def kept(registry: Registry) -> list[Checkpoint]:
    """The states there are, as checkpoints of that root (files, sizes), by stage, name, version."""
    folder = root_of(registry) / "checkpoints"
    names = sorted(os.listdir(folder)) if folder.is_dir() else []
    found = [read_checkpoint(folder / name) for name in names if is_id(name)]
    return sorted((item for item in found if isinstance(item, Checkpoint)), key=lambda item: (item.stage, item.name, item.version))


def restore(registry: Registry, ref: str, target: Path) -> Path:
    """Write the state of a checkpoint's run to TARGET/resume, where a stage with `output: TARGET` goes on from; the save's folder.

    Raises UserError: none is kept, it is damaged (every byte is read), a save of that name or a newer one lies there.
    """
    checkpoint = registry.resolve(ref)
    source = root_of(registry) / "checkpoints" / checkpoint.id
    if not source.is_dir() and not trash.bring_back(root_of(registry), checkpoint.id, "restored"):
        known = ", ".join(item.ref for item in kept(registry)) or "none"
        raise UserError(f"no resumable state of {checkpoint.ref} is kept (keep_resume: true keeps it when a stage publishes, gc drops it first); there is: {known}")
    if problems := check(source, deep=True):
        raise UserError(f"the resumable state of {checkpoint.ref} ({source}) is damaged: {problems[0]}; nothing was written")
    (save,) = (source / STATE).iterdir()
    place = target / "resume"
    if place.is_dir() and any(place.iterdir()):
        raise UserError(f"{place} holds saves already; name another output folder, or remove them first")
    draft = target / draft_name()
    try:
        durable_mkdir(target)
        shutil.copytree(save, draft / save.name, copy_function=shutil.copyfile)
        for name, _ in walk(draft):
            fsync_file(draft / name)
        for below, _, _ in os.walk(draft, topdown=False):
            fsync_dir(Path(below))
        durable_move(draft, place)
    except OSError as error:
        shutil.rmtree(draft, ignore_errors=True)
        if told := storage_error(error, f"writing the resumable state to {target}", "Nothing was written.", "another output folder"):
            raise told from error
        raise
    return place / save.name
