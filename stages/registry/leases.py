"""Leases: a running job that uses a checkpoint says so, and gc leaves the checkpoint where it is.

ROOT/leases/<checkpoint id>/<lease id>.json = {"holder": …, "purpose": …, "expires": UTC}, sealed. Whether a lease counts follows from
what is written in it, never from a lock: it counts until it expires, and lapses at once when its holder is a process of this machine that
has provably ended. Holders renew theirs from a thread. A lease is not synced to the disk: its holder would not outlive a power cut either.
What can't be read (a power cut may leave an empty file) says nothing of itself: it counts for as long as one would that was written when the file was,
since a living holder writes it anew long before.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from stages.registry.holder import Holder, draft_name, provably_dead, this_process
from stages.registry.names import is_id, new_id
from stages.registry.sealing import seal, unseal

LASTS = timedelta(hours=2)
RENEWED = timedelta(minutes=15)  # a renewal may come late seven times
CLOCKS_DIFFER = timedelta(minutes=10)  # between the machines that share a registry
_held: list[Held] = []  # by this process since it began; giving one back twice is harmless


@dataclass(frozen=True)
class Lease:
    """Who uses a checkpoint, and until when at least. `problem`: why the file could not be read; `expires` is then what its times allow, None where they
    can't be told either: such a lease counts until its file is deleted."""

    checkpoint_id: str
    file: Path
    holder: Holder | None = None
    purpose: str = ""
    expires: datetime | None = None
    problem: str | None = None

    def lapsed(self, at: datetime) -> bool:
        """Whether it no longer counts."""
        if self.expires is not None and at > self.expires + CLOCKS_DIFFER:
            return True
        return self.holder is not None and provably_dead(self.holder)

    def __str__(self) -> str:
        if self.holder is not None:
            return f"{self.holder}, {self.purpose}"
        until = f" until {self.expires + CLOCKS_DIFFER:%Y-%m-%d %H:%M} UTC" if self.expires else ""
        return f"the lease {self.file} {self.problem} and counts{until}; delete that file if no job uses the checkpoint"


def leases(root: Path) -> list[Lease]:
    """All leases that there are files of, lapsed ones too."""
    folder = root / "leases"
    return [lease for name in _names(folder) if is_id(name) for lease in leases_of(root, name)]


def leases_of(root: Path, checkpoint_id: str) -> list[Lease]:
    """The leases of one checkpoint, lapsed ones too."""
    folder = root / "leases" / checkpoint_id
    found = [_read(checkpoint_id, folder / name) for name in _names(folder) if name.endswith(".json")]
    return [lease for lease in found if lease is not None]


def counting(root: Path, at: datetime) -> dict[str, list[Lease]]:
    """Checkpoint id -> the leases on it that count."""
    found: dict[str, list[Lease]] = {}
    for lease in leases(root):
        if not lease.lapsed(at):
            found.setdefault(lease.checkpoint_id, []).append(lease)
    return found


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []


def _read(checkpoint_id: str, file: Path) -> Lease | None:
    try:
        body = unseal(file.read_bytes())
        expires = datetime.fromisoformat(str(body["expires"]))
        return Lease(checkpoint_id, file, Holder.from_json(body["holder"]), str(body.get("purpose", "")), expires.astimezone(UTC))
    except FileNotFoundError:
        return None  # given back just now
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return Lease(checkpoint_id, file, expires=_expires_at_the_latest(file), problem=f"cannot be read ({error})")


def _expires_at_the_latest(file: Path) -> datetime | None:
    """Until when a lease may hold that can't be read: LASTS after its file was written, by the file's time or, where that is later, the one in its name
    (a renewal keeps the name). None where the file's time can't be told."""
    try:
        written = datetime.fromtimestamp(file.stat().st_mtime, UTC)
    except (OSError, ValueError, OverflowError):
        return None
    with contextlib.suppress(ValueError):
        written = max(written, datetime.strptime(file.name[:15], "%Y%m%dt%H%M%S").replace(tzinfo=UTC))
    return written + LASTS


@dataclass
class Held:
    """Leases that this process holds, renewed until they are given back."""

    root: Path
    purpose: str
    files: list[Path]
    done: threading.Event = field(default_factory=threading.Event)
    pid: int = field(default_factory=os.getpid)

    def renew(self) -> None:
        """Write every lease again, to last LASTS from now."""
        for file in self.files:
            _write(file, self.purpose)

    def give_back(self) -> None:
        """Remove the leases; harmless when they are gone, and in a child that was forked meanwhile."""
        self.done.set()
        if os.getpid() == self.pid:
            atexit.unregister(self.give_back)
            for file in self.files:
                with contextlib.suppress(OSError):
                    file.unlink()
                with contextlib.suppress(OSError):
                    file.parent.rmdir()  # stays while others hold leases on the checkpoint


def take(root: Path, checkpoint_ids: Iterable[str], purpose: str, *, renewed: bool = True) -> Held:
    """Take a lease on each checkpoint; they are renewed until `give_back`, or until this process ends. Raises OSError.

    renewed false: for what takes far less than LASTS and gives back in a `finally`; it needs no thread.

    The caller looks only afterwards whether the checkpoints are still in their place: gc moves first and looks for leases afterwards, so of
    the two at least one sees the other.
    """
    files = [root / "leases" / item / f"{new_id()}.json" for item in dict.fromkeys(checkpoint_ids)]
    held = Held(root, purpose, files)
    try:
        held.renew()
    except OSError:
        held.give_back()
        raise
    if not renewed:
        return held
    _held.append(held)
    atexit.register(held.give_back)
    threading.Thread(target=_keep, args=(held,), name="registry leases", daemon=True).start()
    return held


def give_back_all() -> None:
    """Give back every lease of this process, which is ending."""
    while _held:
        _held.pop().give_back()


def take_if_possible(root: Path, checkpoint_ids: Iterable[str], purpose: str, *, renewed: bool = True) -> Held | None:
    """`take`, or None and a warning on stderr where the registry can't be written."""
    try:
        return take(root, checkpoint_ids, purpose, renewed=renewed)
    except OSError as error:
        print(f"warning: no lease could be written in {root} ({error.strerror}); gc may move the checkpoints that are in use", file=sys.stderr)
        return None


def _keep(held: Held) -> None:
    """Renew until given back. A renewal that fails is tried again soon: the lease still counts for most of LASTS."""
    wait = RENEWED
    while not held.done.wait(wait.total_seconds()):
        try:
            held.renew()
            wait = RENEWED
        except OSError:
            wait = RENEWED / 15
        if held.done.is_set():  # given back while it was written
            held.give_back()


def _write(file: Path, purpose: str) -> None:
    expires = (datetime.now(UTC) + LASTS).isoformat(timespec="seconds")
    content = seal({"checkpoint": file.parent.name, "holder": this_process().to_json(), "purpose": purpose, "expires": expires})
    draft = file.parent / draft_name()
    for attempt in range(20):
        try:
            for folder in (file.parent.parent, file.parent):  # no further up: a registry that was deleted stays deleted
                folder.mkdir(exist_ok=True)
            draft.write_bytes(content)
            os.replace(draft, file)
            return
        except FileNotFoundError:  # another process gave back its lease between two of these lines, and the empty folder with it
            if attempt == 19:
                raise
