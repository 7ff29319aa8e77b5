"""The registry's folder: opening one, starting one, refusing what is something else."""

from __future__ import annotations

import os
import secrets
import stat
import sys
from functools import cache
from pathlib import Path

from configs.errors import UserError
from stages.registry.ledger import link_new
from stages.registry.names import now
from stages.registry.sealing import seal, unseal
from stages.registry.storage import MARK, durable_mkdir, storage_error

FORMAT = "align-registry"
VERSION = 1


def open_root(root: Path, create: bool) -> None:
    """Check that `root` is a registry this version reads, or start one. Raises UserError."""
    if not root.exists() and not create:
        raise UserError(
            f"{root}: no registry here. Train a stage first (align run, align sft), or name another with --registry"
        )
    if root.exists() and not root.is_dir():
        raise UserError(f"{root} is a file; a registry is a folder: choose another path")
    try:
        warn_where_anyone_writes(root)
        if _marked(root):
            return
        strange = [name for name in (os.listdir(root) if root.exists() else []) if not name.startswith(".tmp-")]
        if strange and not _marked(root):  # a second look: another process may just have started it
            raise UserError(
                f"{root} is not a registry: it holds {strange[0]!r} and no {MARK}. Choose an empty or new folder "
                "(if it was a registry, restore that file)"
            )
        if strange:
            return
        if not create:
            raise UserError(
                f"{root} is an empty folder, not a registry. Train a stage first, or name another with --registry"
            )
        durable_mkdir(root)
        link_new(
            root / MARK, seal({"format": FORMAT, "version": VERSION, "created": now(), "id": secrets.token_hex(8)})
        )
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"{root} cannot be a registry: a folder of this path is a file; choose another path") from error
    except OSError as error:
        if told := storage_error(error, f"opening the registry {root}"):
            raise told from error
        raise


@cache
def warn_where_anyone_writes(root: Path) -> None:
    """Say once on stderr that every user of this machine may put other weights in a checkpoint's place. A warning, because some volumes show such rights for all."""
    for folder in (root, root / "checkpoints"):
        mode = folder.stat().st_mode if folder.is_dir() else 0
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            print(f"warning: {folder} may be written by every user of this machine, who could replace what is in it; close it: chmod o-w {folder}", file=sys.stderr)
            return


def _marked(root: Path) -> bool:
    try:
        content = (root / MARK).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return False
    try:
        mark = unseal(content)
    except ValueError as error:
        raise UserError(f"{root / MARK}: {error}. Restore it from a backup, or choose another folder") from None
    if mark.get("format") != FORMAT or not isinstance(mark.get("version"), int):
        raise UserError(f"{root / MARK} belongs to something else ({mark.get('format')!r}); choose another folder")
    if mark["version"] > VERSION:
        raise UserError(f"{root} has format {mark['version']}, this program reads up to {VERSION}: upgrade align-stack")
    return True
