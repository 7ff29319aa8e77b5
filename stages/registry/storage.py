"""What makes a write durable: fsync of files and folders, and storage faults told in words."""

from __future__ import annotations

import errno
import os
import re
import shutil
from pathlib import Path

from configs.errors import UserError

ROOM_RESERVE = (
    16 * 2**20
)  # bytes kept free beyond what a checkpoint needs: the manifest, aliases and logs of other jobs

_ADVICE = {
    errno.ENOSPC: "the disk is full: free some room or choose another registry folder",
    errno.EDQUOT: "the disk quota is used up: free some room or choose another registry folder",
    errno.EACCES: "permission denied: check who owns the folder, or choose another registry folder",
    errno.EPERM: "operation not permitted: check the folder's owner, or choose another registry folder",
    errno.EROFS: "the file system is read-only: choose another registry folder",
    errno.EIO: "the disk reported an input/output error: check the disk, or choose another registry folder",
}


def fsync_dir(folder: Path) -> None:
    """Make the entries of a folder durable (a rename or link is only in memory until then)."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def durable_mkdir(folder: Path) -> None:
    """mkdir -p whose every new level survives a power cut."""
    if folder.is_dir():
        return
    durable_mkdir(folder.parent)
    try:
        os.mkdir(folder)
    except FileExistsError:
        if not folder.is_dir():
            raise
    fsync_dir(folder.parent)


def write_exclusive(path: Path, content: bytes) -> None:
    """Create a file that must not exist yet, write it, fsync it."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    with os.fdopen(handle, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def storage_error(error: BaseException, doing: str) -> UserError | None:
    """The UserError for a full disk, missing permission and the like; None when `error` is something else.

    Rust writers (safetensors, tokenizers) raise their own exception types with the errno in the text.
    """
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (found := re.search(r"os error (\d+)", str(error))):
        number = int(found.group(1))
    if number not in _ADVICE:
        return None
    file = getattr(error, "filename", None)
    return UserError(f"{doing} failed{f' at {file}' if file else ''}: {_ADVICE[number]}. The registry is unchanged.")


def check_room(folder: Path, need: int) -> None:
    """Refuse before writing when fewer than `need` bytes (plus a reserve) are free. Raises UserError."""
    free = shutil.disk_usage(folder).free
    if free < need + ROOM_RESERVE:
        raise UserError(
            f"{folder}: {free / 2**20:.0f} MiB are free and the checkpoint needs about "
            f"{(need + ROOM_RESERVE) / 2**20:.0f} MiB. Free some room or choose another registry folder. "
            "Nothing was published."
        )
