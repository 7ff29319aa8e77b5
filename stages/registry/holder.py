"""Which process a lease or a staging folder belongs to, and whether that process is provably gone.

A process is known by the boot of its kernel, its PID namespace, its PID and the moment it started: a PID alone is used
again. From another kernel (another node, a machine that was started anew) nothing can be proved; there only time tells.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any

from stages import processes
from stages.registry.names import new_id

_STAGING = re.compile(r"\.tmp-(?P<id>(?P<time>\d{8}t\d{6})-[0-9a-f]{12})(\.(?P<boot>[0-9a-f]{12})\.(?P<space>\d+)\.(?P<pid>\d+)\.(?P<start>\d+))?")


@dataclass(frozen=True)
class Holder:
    """One process. `boot`, `space` and `start` are "" and 0 where the system does not tell them (not Linux)."""

    host: str  # for people; two machines may share a name, so it proves nothing
    boot: str  # the first 12 hex digits of the kernel's boot id
    space: int  # inode of the PID namespace
    pid: int
    start: int  # clock ticks between boot and the process's start

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Holder:
        """From a lease. Raises ValueError when a field is missing or of another type."""
        values = {key: entry.get(key) for key in cls.__dataclass_fields__}
        if any(not isinstance(value, str if key in ("host", "boot") else int) for key, value in values.items()):
            raise ValueError("names no holder (host, boot, space, pid, start)")
        return cls(**values)  # type: ignore[arg-type]

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


def this_process() -> Holder:
    """The process that asks."""
    pid = os.getpid()
    return Holder(socket.gethostname(), _boot(), processes.pid_space(), pid, processes.start_time(pid) or 0)


def provably_dead(holder: Holder) -> bool:
    """Whether a process of this kernel and PID namespace has ended; False wherever that can't be known."""
    if not holder.boot or (holder.boot, holder.space) != (_boot(), processes.pid_space()) or not holder.start:
        return False
    return processes.start_time(holder.pid) != holder.start


def staging_name(checkpoint_id: str) -> str:
    """`.tmp-<id>` with its writer in the name: a folder whose writer was killed can be told from one that is being filled."""
    holder = this_process()
    return f".tmp-{checkpoint_id}" + (f".{holder.boot}.{holder.space}.{holder.pid}.{holder.start}" if holder.boot and holder.start else "")


def draft_name() -> str:
    """A name for a file that is not finished: unique, with the time and the writer in it."""
    return staging_name(new_id())


def is_leftover(name: str, older_than: timedelta, at: datetime) -> bool | None:
    """Whether what is called `.tmp-…` may be removed: its writer is provably dead, or it was begun more than `older_than` before `at`
    by a writer of whom nothing can be known.

    None when the name tells neither writer nor time.
    """
    found = _STAGING.fullmatch(name)
    if found is None:
        return None
    if found["boot"]:
        holder = Holder("", found["boot"], int(found["space"]), int(found["pid"]), int(found["start"]))
        if (holder.boot, holder.space) == (_boot(), processes.pid_space()):
            return provably_dead(holder)
    return at - datetime.strptime(found["time"], "%Y%m%dt%H%M%S").replace(tzinfo=UTC) > older_than


@cache
def _boot() -> str:
    return processes.boot_id().replace("-", "")[:12]
