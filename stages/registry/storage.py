"""What makes a write durable: fsync of files and folders, and storage faults told in words."""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import re
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from configs.errors import UserError

ROOM_RESERVE = (
    16 * 2**20
)  # bytes kept free beyond what a checkpoint needs: the manifest, aliases and logs of other jobs

MARK = "registry.json"  # the file that makes a folder a registry
_durable: set[tuple[int, int]] = set()  # device and inode of folders whose name is known to be on the disk

_ADVICE = {
    errno.ENOSPC: "the disk is full: free some room or choose {place}",
    errno.EDQUOT: "the disk quota is used up: free some room or choose {place}",
    errno.EACCES: "permission denied: check who owns the folder, or choose {place}",
    errno.EPERM: "operation not permitted: check the folder's owner, or choose {place}",
    errno.EROFS: "the file system is read-only: choose {place}",
    errno.EIO: "the disk reported an input/output error: check the disk, or choose {place}",
}
REGISTRY = "another registry folder"


_FICLONE = 0x40049409  # ioctl of Linux: the target shares the source's blocks until one of the two is written (btrfs, XFS, bcachefs, NFS 4.2)
_CANNOT_SHARE = (  # not a fault of the disk: this pair of files, or this file system, can't share; a copy does as well
    errno.EMLINK, errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTTY, errno.EINVAL, errno.ETXTBSY, errno.ENOENT,
)  # fmt: skip

_CANNOT_SYNC = (  # a folder above ours that is not ours to open, and so not made by a process of ours; one on a file system that syncs no folders
    errno.EACCES, errno.EPERM, errno.EROFS, errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.ENOSYS,
)  # fmt: skip


def fsync_dir(folder: Path) -> None:
    """Make the entries of a folder durable (a rename or link is only in memory until then)."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def durable_mkdir(folder: Path) -> None:
    """mkdir -p whose every level survives a power cut.

    Also levels that were there already: whoever made one (a process that was killed, a person) need not have synced it. Each once a process,
    since afterwards nothing of ours takes a level away again. Raises OSError.
    """
    if folder.is_dir():
        unknown = list(itertools.takewhile(lambda level: _identity(level) not in _durable, _levels(folder)))
        for level in reversed(unknown):  # from the top: what is known to be durable is so with all above it
            _sync_name(level)
            _durable.add(_identity(level))
        return
    durable_mkdir(folder.parent)
    try:
        os.mkdir(folder)
    except FileExistsError:
        if not folder.is_dir():
            raise
    fsync_dir(folder.parent)
    _durable.add(_identity(folder))


def sync_names(folder: Path) -> None:
    """Make the names by which an existing folder is reached survive a power cut, of all levels of its file system: whoever made one need not have
    synced it, and it may have been made anew since this process last looked. Raises OSError."""
    for level in _levels(folder):
        _sync_name(level)


def _levels(folder: Path) -> Iterator[Path]:
    """A folder and those above it, without the one that its file system is mounted on: that name is not of this disk."""
    level = folder.resolve()
    while level != level.parent and os.stat(level).st_dev == os.stat(level.parent).st_dev:
        yield level
        level = level.parent


def _sync_name(folder: Path) -> None:
    try:
        fsync_dir(folder.parent)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise


def _identity(folder: Path) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def write_exclusive(path: Path, content: bytes) -> None:
    """Create a file that must not exist yet, write it, fsync it."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    with os.fdopen(handle, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def fsync_file(path: Path) -> None:
    """Make a file's content and mode durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def protect(path: Path) -> None:
    """Take away every right to write a file, and let those read it who may read its folder. Raises OSError, where it belongs to somebody else."""
    mode = stat.S_IMODE(os.lstat(path).st_mode)
    if (protected := readable(path, mode) & ~0o222) != mode:
        os.chmod(path, protected)


def readable(path: Path, mode: int) -> int:
    """A file's mode with its folder's rights to read: safetensors writes files that nobody but their owner may read, whatever the umask."""
    return mode | (stat.S_IMODE(os.stat(path.parent).st_mode) & 0o444)


def protect_own(path: Path) -> None:
    """The same for a file that this process has written; where the file system knows no rights (many mounts of buckets and of Windows shares) it stays
    as it is: a model must not be lost for that. Such a file is never shared. Raises OSError for faults of the disk."""
    try:
        protect(path)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            raise


def reflink(source: Path, target: Path) -> bool:
    """Make `target`, which must not exist, a file that shares the blocks of `source`; False where the file system can't."""
    try:
        original = open(source, "rb")  # noqa: SIM115 - closed by the `with` below; only this failure is the source's
    except OSError:  # removed meanwhile, or not ours to read
        return False
    with original:
        handle = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            fcntl.ioctl(handle, _FICLONE, original.fileno())
            return True
        except OSError as error:
            os.unlink(target)
            if error.errno not in _CANNOT_SHARE:
                raise
            return False
        finally:
            os.close(handle)


def hardlink(source: Path, target: Path) -> bool:
    """Make `target`, which must not exist, a second name of `source`; False where the file system or the system's rules forbid it."""
    try:
        os.link(source, target, follow_symlinks=False)
        return True
    except OSError as error:
        if error.errno not in _CANNOT_SHARE:
            raise
        return False


def replace(source: Path, target: Path) -> None:
    """Let `source` take the place of `target`, at once."""
    os.replace(source, target)
    source.unlink(missing_ok=True)  # of two names of one file, rename(2) leaves both


def storage_error(error: BaseException, doing: str, left: str = "The registry is unchanged.", place: str = REGISTRY) -> UserError | None:
    """The UserError for a full disk, missing permission and the like; None when `error` is something else. left: in what state things are; place: what
    else could be chosen.

    Rust writers (safetensors, tokenizers) and shutil.copytree raise their own exception types with the errno in the text.
    """
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (found := re.search(r"(?:os error|\[Errno) (\d+)", str(error))):
        number = int(found.group(1))
    if number not in _ADVICE:
        return None
    file = getattr(error, "filename", None)
    return UserError(f"{doing} failed{f' at {file}' if file else ''}: {_ADVICE[number].format(place=place)}. {left}")


def check_room(folder: Path, need: int, left: str = "Nothing was published.", place: str = REGISTRY) -> None:
    """Refuse before writing when fewer than `need` bytes (plus a reserve) are free; `left` and `place` as of `storage_error`. Raises UserError."""
    free = shutil.disk_usage(folder).free
    if free < need + ROOM_RESERVE:
        raise UserError(
            f"{folder}: {free / 2**20:.0f} MiB are free and the checkpoint needs about "
            f"{(need + ROOM_RESERVE) / 2**20:.0f} MiB. Free some room or choose {place}. {left}"
        )


def durable_move(source: Path, target: Path) -> None:
    """Rename a folder whose new name must be free; both parents are synced, so that a power cut leaves it at one of the two. Raises OSError."""
    os.rename(source, target)
    fsync_dir(target.parent)
    if source.parent != target.parent:
        fsync_dir(source.parent)
