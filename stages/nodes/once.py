"""Work that one process of a node does for all of them: reading, downloading, tokenising. The others take its result from local disk."""

from __future__ import annotations

import os
import pickle
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar, cast

from configs.errors import UserError
from stages.nodes.place import local_rank, local_world_size, node_count, node_rank
from stages.training.watchdog import during

T = TypeVar("T")
POLL = 0.05  # seconds


def cache_folder() -> Path:
    """Where a node keeps what its processes share: ALIGN_CACHE, else the job's or the machine's folder for temporary files. Local disk, please."""
    return Path(os.environ.get("ALIGN_CACHE") or os.environ.get("SLURM_TMPDIR") or tempfile.gettempdir())


def once_per_node(what: str, function: Callable[[], T], *, node_0_first: bool = False) -> T:
    """What `function()` gives, called by the first process of each node alone; every process must come here.

    The others wait for a file, not in a collective, whose time would run out over a large data set, and read what was left there: pickled, in a folder
    of a random name that only this user can enter, removed once all have read it. `node_0_first`: the other nodes begin when node 0 is done, so that
    what it has downloaded into a cache they share is not downloaded again.

    Raises:
        UserError: on every process, when the call failed on any node.
    """
    with during("data"):
        return function() if local_world_size() == 1 and node_count() == 1 else _once(what, function, node_0_first)


def _once(what: str, function: Callable[[], T], node_0_first: bool) -> T:
    from stages.training.ranks import from_rank_0

    folder = cache_folder() / f"align-{from_rank_0('naming a folder', lambda: secrets.token_hex(16))}-{node_rank()}"
    found: Found[T] | None = None
    try:
        if node_0_first and node_count() > 1:
            found = _shared(folder, function) if node_rank() == 0 else None
            _agree(what, found)
        found = found or _shared(folder, function)
        _agree(what, found)
    finally:
        if local_rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
    return cast(T, found.value)


@dataclass(frozen=True)
class Found(Generic[T]):
    """What a call gave, or in words why it gave nothing."""

    value: T | None
    wrong: str = ""


def _shared(folder: Path, function: Callable[[], T]) -> Found[T]:
    """What this node's first process found; the node's other processes wait for it."""
    result = folder / "result"
    if local_rank() == 0:
        found = _call(function)
        if local_world_size() > 1:
            try:
                folder.mkdir(mode=0o700)
                (folder / "part").write_bytes(pickle.dumps(found, protocol=pickle.HIGHEST_PROTOCOL))
                os.replace(folder / "part", result)
            except OSError as error:  # this process ends, and its launcher ends the others, which wait for the file
                raise UserError(f"{folder}: can't be written ({error.strerror}); set ALIGN_CACHE to a folder on local disk with room") from error
        return found
    while not result.exists():  # the launcher ends this process if the one that it waits for dies
        time.sleep(POLL)
    return cast(Found[T], pickle.loads(result.read_bytes()))


def _call(function: Callable[[], T]) -> Found[T]:
    try:
        return Found(function())
    except UserError as error:
        return Found(None, str(error))
    except Exception as error:  # reaches every process as words, or those on other nodes would wait for this one
        return Found(None, f"{type(error).__name__}: {error}")


def _agree(what: str, found: Found[T] | None) -> None:
    """Raise on every process what went wrong on any node."""
    from accelerate.utils import gather_object

    for number, wrong in enumerate(gather_object([found.wrong if found else ""])):
        if wrong:
            node = number // local_world_size()
            raise UserError(wrong if node == 0 else f"node {node}, {what}: {wrong}")
