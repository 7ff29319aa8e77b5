"""The commit protocol: a checkpoint becomes visible by one rename, whole and durable, or not at all.

room check → unique id → staging folder → the caller writes → files hashed → those that an older checkpoint holds shared
with it → files made read-only and fsynced → folders fsynced → version number claimed → manifest (with its own hash) last →
one rename → fsync of the parent → acknowledged. A process that is killed anywhere leaves at most a `.tmp-<id>` folder,
which nobody reads, and a number that nobody uses.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from configs.errors import UserError
from stages.registry.holder import staging_name
from stages.registry.integrity import walk
from stages.registry.manifest import MANIFEST, MODEL
from stages.registry.sealing import hash_files, seal
from stages.registry.sharing import Holders, share
from stages.registry.storage import fsync_dir, fsync_file, protect_own, storage_error, write_exclusive

PICKLES = (
    ".bin",
    ".pt",
    ".pth",
    ".pkl",
    ".pickle",
    ".ckpt",
)  # can run code when opened; training_args.bin holds a token


def commit(
    folder: Path,
    checkpoint_id: str,
    what: str,
    write: Callable[[Path], None],
    check: Callable[[Path], None],
    manifest: Callable[[dict[str, Any]], dict[str, Any]],
    holders: Holders | None = None,
) -> Path:
    """Publish one checkpoint under folder/<checkpoint_id>; returns that path.

    `write(model_dir)` fills the model folder, `check(model_dir)` may refuse it, `manifest(files)` claims the version
    and returns the manifest's content; `holders` finds older files to share. Whatever any of them raises, the staging folder is removed.
    Raises UserError for a full disk, missing permission, an empty folder, links and pickles in it.
    """
    staging, final = folder / staging_name(checkpoint_id), folder / checkpoint_id
    try:
        os.mkdir(staging)
        model_dir = staging / MODEL
        os.mkdir(model_dir)
        write(model_dir)
        _refuse_strange(model_dir, what)
        check(model_dir)
        files = _hashed(staging)
        if holders is not None:
            share(staging, files, holders)
        for name in files:
            protect_own(staging / name)
            fsync_file(staging / name)
        for below, _, _ in os.walk(staging, topdown=False):
            fsync_dir(Path(below))
        write_exclusive(staging / MANIFEST, seal(manifest(files)))
        fsync_dir(staging)
        os.rename(staging, final)
    except BaseException as error:
        shutil.rmtree(staging, ignore_errors=True)
        if told := storage_error(error, f"publishing {what}"):
            raise told from error
        raise
    _confirm(folder, final, what)
    return final


def _hashed(staging: Path) -> dict[str, dict[str, Any]]:
    """Relative path -> size (bytes) and hash of every file. Raises OSError."""
    sizes = {staging / name: status.st_size for name, status in walk(staging)}
    files = {}
    for file, digest in hash_files(sizes).items():
        if isinstance(digest, OSError):
            raise digest
        files[file.relative_to(staging).as_posix()] = {"size": sizes[file], "blake3": digest}
    return files


def _confirm(folder: Path, final: Path, what: str) -> None:
    try:
        fsync_dir(folder)
    except OSError as error:
        raise UserError(
            f"{what} was published at {final}, but the disk did not confirm that it would survive a power cut "
            f"({error.strerror}). Check the disk, then: align registry verify {final.name} --deep"
        ) from error


def _refuse_strange(model_dir: Path, what: str) -> None:
    """Only plain files below a plain folder, no pickles, and at least one file."""
    if model_dir.is_symlink() or not model_dir.is_dir():
        raise UserError(f"{what}: the model folder was replaced while it was written; write the files into it")
    entries = list(walk(model_dir))
    if not entries:
        raise UserError(f"{what}: the model folder is empty, nothing to publish; save the model and tokenizer into it")
    for name, status in entries:
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{what}: {name} is a link or special file; a checkpoint holds plain files only: copy it")
        if name.endswith(PICKLES):
            raise UserError(
                f"{what}: {name} may be a pickle, which can run code when it is opened. Save weights as safetensors "
                "(model.save_pretrained) and leave training_args.bin out"
            )
