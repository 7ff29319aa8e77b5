"""Where the index of a registry lies: on a disk of this machine, in a folder that only this user can write."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

from stages.mounts import on_network
from stages.registry.sealing import hash_bytes

_FORMAT = 1  # of the tables; another number is another file


def index_file(root: Path) -> Path:
    """$XDG_CACHE_HOME (or ~/.cache, or, where that is on a network, the folder for temporary files)/align-stack/index-<key>.sqlite."""
    try:
        mark = (root / "registry.json").read_bytes()  # carries a random id: another registry at the same path has another index
    except OSError:
        mark = b""
    key = hash_bytes(os.path.realpath(root).encode() + b"\0" + mark)[:32]
    return cache_folder() / f"index-{_FORMAT}-{key}.sqlite"


def cache_folder() -> Path:
    """A folder for what can be made again; not created here."""
    if chosen := os.environ.get("XDG_CACHE_HOME"):
        return Path(chosen) / "align-stack"
    home = Path(os.path.expanduser("~"), ".cache")
    if os.access(home if home.is_dir() else home.parent, os.W_OK) and not on_network(home):
        return home / "align-stack"
    shared = Path(tempfile.gettempdir(), f"align-stack-{os.geteuid()}")
    return shared if _ours(shared) else shared.with_name(f"align-stack-{os.geteuid()}-{os.getpid()}")


def _ours(folder: Path) -> bool:
    """Whether a folder below /tmp is absent or made by this user for itself alone: anybody may have put one there."""
    try:
        found = os.lstat(folder)
    except FileNotFoundError:
        return True
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o077
