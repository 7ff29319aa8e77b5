"""Append-only folders of numbered files: 00000001.json, 00000002.json, …

The next number is claimed with link(2): of two writers exactly one gets it, the file appears whole, and this holds on
network file systems too, where flock and modification times do not. Aliases, evaluations and version numbers use it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from configs.errors import UserError
from stages.registry.holder import draft_name
from stages.registry.sealing import seal, unseal
from stages.registry.storage import durable_mkdir, fsync_dir, write_exclusive

_ENTRY = re.compile(r"(\d{8})\.json")


def entry_path(folder: Path, number: int) -> Path:
    """Where entry `number` lies."""
    return folder / f"{number:08d}.json"


def numbers(folder: Path) -> list[int]:
    """The numbers in use, ascending; [] when the folder is absent. Leftovers of killed writers are not counted."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    return sorted(int(found.group(1)) for name in names if (found := _ENTRY.fullmatch(name)))


def read(folder: Path, number: int) -> dict[str, Any]:
    """One entry. Raises UserError naming the file when it is damaged."""
    path = entry_path(folder, number)
    try:
        return unseal(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error}. Restore this file from a backup, or remove it if it may be lost.") from None


def append(folder: Path, body: Callable[[int], dict[str, Any]], floor: int = 0) -> int:
    """Write body(number) as the next entry after every entry there and after `floor`; returns the number.

    `body` is called again with a higher number when another writer took the first, and may raise to give up.
    Raises OSError.
    """
    durable_mkdir(folder)
    while True:
        number = max([floor, *numbers(folder)]) + 1
        if link_new(entry_path(folder, number), seal(body(number))):
            return number


def link_new(path: Path, content: bytes) -> bool:
    """Create `path` whole and durable unless it exists; False when it does."""
    draft = path.parent / draft_name()
    try:
        write_exclusive(draft, content)
        os.link(draft, path)
    except FileExistsError:
        if os.stat(draft).st_nlink != 2:  # 2: NFS repeated a request that had already succeeded
            return False
    except OSError as error:
        if error.errno in (errno.ENOTSUP, errno.EMLINK, errno.ENOSYS, errno.EPERM):
            raise UserError(
                f"{path.parent}: this file system makes no hard links; choose another registry folder"
            ) from None
        raise
    finally:
        with contextlib.suppress(OSError):  # it is done, or failed for a reason that matters more; gc removes what is left
            draft.unlink(missing_ok=True)
    try:
        fsync_dir(path.parent)
    except OSError as error:
        raise UserError(
            f"{path} was written, but the disk did not confirm that it would survive a power cut ({error.strerror}). "
            "Check the disk, then try again"
        ) from error
    return True
