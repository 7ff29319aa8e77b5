"""One run per working folder, `align run`, `align sft` or a bare stage: an exclusive claim that a dead process cannot hold.

Claims are files `.lock/00000001.json`, `.lock/00000002.json`, …; the highest is the one that counts. A claim is made by link(2),
which fails where the file exists, so of two processes that see the same dead claim only one gets the next number. (Replacing a
dead process's file instead would let a slow process remove the claim of a fast one.)
"""

from __future__ import annotations

import errno
import json
import os
import platform
import secrets
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from configs.errors import UserError
from stages import processes

TOKEN = "ALIGN_CLAIM"


class Claim:
    """Context manager; entering raises UserError while another live process holds the folder, or where it cannot be written.

    Who starts a process that works for it in the same folder hands on its token in ALIGN_CLAIM: that process's claim is the same one.
    """

    def __init__(self, output: Path, what: str, patience: float = 60.0, here_only: bool = False) -> None:
        """`what` claims, in a person's words: `align run`, `stages.sft`. `patience`: seconds to wait for the stage of a killed run, which the kernel has
        told to stop. `here_only`: a claim made on another machine, which nobody can look at from here, is warned of and taken over; for what must go on
        unattended wherever a scheduler starts it again."""
        self.folder = output / ".lock"
        self.what, self.patience, self.here_only = what, patience, here_only
        self.token = secrets.token_hex(16)
        self._mine: Path | None = None

    @property
    def handed_on(self) -> dict[str, str]:
        """Variables for a process that works for this one in the same folder."""
        return {TOKEN: self.token}

    def __enter__(self) -> Claim:
        try:
            return self._take()
        except OSError as error:
            raise UserError(f"{self.folder.parent} cannot be written: {error.strerror}; give another output folder with output=PATH") from error

    def _take(self) -> Claim:
        self.folder.mkdir(parents=True, exist_ok=True)
        while self._mine is None:
            number, holder = self._highest()
            if holder and holder.get("token") == os.environ.get(TOKEN, ""):
                return self  # of the process that has started this one
            until = time.monotonic() + self.patience
            while holder and is_alive(holder) and not is_alive({**holder, "child": None}) and time.monotonic() < until:
                time.sleep(0.1)
            if holder is not None and is_alive(holder):
                self._yield_or_warn(number, holder)
            self._mine = self._claim(number + 1)
        number, holder = self._highest()
        if self._path(number) != self._mine:  # we were slow: someone claimed, finished a claim above ours, and tidied ours away
            self._mine.unlink(missing_ok=True)
            self._refuse(number, holder or {})
        for path in self.folder.glob("*.json"):
            if path < self._mine:
                path.unlink(missing_ok=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self._mine is not None:
            with suppress(OSError):  # a disk that fails: the claim ends with this process all the same
                self._mine.unlink(missing_ok=True)
            self._mine = None

    def holder(self) -> tuple[Path, dict[str, Any]] | None:
        """The claim that counts and who made it; None where nobody has."""
        number, found = self._highest() if self.folder.is_dir() else (0, None)
        return (self._path(number), found) if found else None

    def record_child(self, pid: int) -> None:
        """Remember the process group we started, so that who comes after our death can wait for it."""
        assert self._mine is not None
        with suppress(OSError):  # a full disk: the claim stays without it, and the child runs already
            _write(self._mine, {**self._content(), "child": identity(pid)})

    def _content(self) -> dict[str, Any]:
        return {**identity(os.getpid()), "what": self.what, "token": self.token}

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:08d}.json"

    def _highest(self) -> tuple[int, dict[str, Any] | None]:
        numbers = [int(path.stem) for path in self.folder.glob("*.json") if path.stem.isdigit()]
        if not numbers:
            return 0, None
        try:
            holder = json.loads(self._path(max(numbers)).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            holder = {}  # released a moment ago, or cut off by a power failure: nobody holds it
        return max(numbers), holder if isinstance(holder, dict) and isinstance(holder.get("pid"), int) else {}

    def _claim(self, number: int) -> Path | None:
        draft = self.folder / f"draft-{os.getpid()}-{time.monotonic_ns()}"
        draft.write_text(json.dumps(self._content()), encoding="utf-8")
        try:
            os.link(draft, self._path(number))
        except FileExistsError:
            return None
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
                raise
            with suppress(FileExistsError), self._path(number).open("x", encoding="utf-8") as stream:  # a file system without hard links
                stream.write(draft.read_text(encoding="utf-8"))
                return self._path(number)
            return None
        finally:
            draft.unlink()
        return self._path(number)

    def _yield_or_warn(self, number: int, holder: dict[str, Any]) -> None:
        if not self.here_only or holder.get("host") == platform.node():
            self._refuse(number, holder)
        print(
            f"warning: {self.folder.parent}: `{holder.get('what', 'another run')}` on {holder.get('host', '?')} (since {holder.get('since', '?')}) did not say that it had ended; "
            "if it still runs, stop one of the two, for each would remove the other's saves",
            file=sys.stderr,
        )

    def _refuse(self, number: int, holder: dict[str, Any]) -> None:
        where = f"process {holder.get('pid', '?')} on {holder.get('host', '?')}"
        raise UserError(
            f"{self.folder.parent}: `{holder.get('what', 'another run')}` ({where}, since {holder.get('since', '?')}) works in this folder already. "
            f"Wait for it or stop it; or give this run its own folder with output=PATH. "
            f"If that machine is gone for good, delete {self._path(number)}"
        )


def identity(pid: int) -> dict[str, Any]:
    """What tells a process from a later one that got the same number: host, boot and start time; and the cluster's job, if any."""
    return {
        "pid": pid, "start": processes.start_time(pid), "boot": processes.boot_id(), "host": platform.node(), "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "job": os.environ.get("ALIGN_JOB"),
    }  # fmt: skip


def is_alive(holder: dict[str, Any] | None) -> bool:
    """Whether the process, or the child it recorded, still runs. A process of another machine counts as alive,
    unless it belongs to our own job: a cluster starts a job again, perhaps elsewhere, only once its last start has ended."""
    if not holder:
        return False
    if holder.get("host") != platform.node():
        return not holder.get("job") or holder["job"] != os.environ.get("ALIGN_JOB")
    if holder.get("boot") != processes.boot_id():
        return False
    here = processes.start_time(int(holder["pid"]))
    if here is not None and here == holder.get("start"):
        return True
    return is_alive(holder.get("child"))


def _write(path: Path, content: dict[str, Any]) -> None:
    draft = path.with_suffix(f".{os.getpid()}.tmp")
    draft.write_text(json.dumps(content), encoding="utf-8")
    os.replace(draft, path)
