"""Counts every file system call that Python makes below a folder, and can interrupt each of them.

Covered: what `os` offers to change a file system, files opened with `open`, `io.open`, `os.fdopen` and pathlib (each write(2) of
theirs), shutil (built of these), and the ioctl behind a reflink. Not covered: reads of directory listings and stat, which leave
nothing behind, and files written by compiled code (safetensors' writer): only a process killed at a random time is interrupted there.
"""

from __future__ import annotations

import builtins
import fcntl
import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# name in os -> which arguments are paths or handles, and the keyword that holds the folder each path is relative to
_CALLS: dict[str, tuple[tuple[int, str | None], ...]] = {
    "mkdir": ((0, "dir_fd"),), "rmdir": ((0, "dir_fd"),), "unlink": ((0, "dir_fd"),), "remove": ((0, "dir_fd"),),
    "rename": ((0, "src_dir_fd"), (1, "dst_dir_fd")), "replace": ((0, "src_dir_fd"), (1, "dst_dir_fd")),
    "link": ((0, "src_dir_fd"), (1, "dst_dir_fd")), "symlink": ((1, "dir_fd"),), "truncate": ((0, None),),
    "chmod": ((0, "dir_fd"),), "utime": ((0, "dir_fd"),), "open": ((0, "dir_fd"),), "write": ((0, None),), "pwrite": ((0, None),),
    "writev": ((0, None),), "ftruncate": ((0, None),), "fsync": ((0, None),), "fdatasync": ((0, None),), "fchmod": ((0, None),),
    "posix_fallocate": ((0, None),), "sendfile": ((0, None),), "copy_file_range": ((1, None),),
    "setxattr": ((0, None),),
}  # fmt: skip
_WRITES = ("write", "pwrite", "writev", "sendfile", "copy_file_range")
_REAL = {name: getattr(os, name) for name in _CALLS}
_OPEN, _IOCTL = io.open, fcntl.ioctl


@dataclass(frozen=True)
class Call:
    """One call: `name` as in os, "read" for an open that reads; `paths` absolute; `site` the lines of the project's own code that led to it, outermost first."""

    name: str
    paths: tuple[str, ...]
    site: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.name} {' -> '.join(os.path.basename(path) for path in self.paths)}"


class Hook:
    """What a test does at a call. Both may raise or kill; `before` may return a limit in bytes for a write."""

    def before(self, index: int, call: Call) -> int | None:
        """`index` counts from 1."""
        return None

    def after(self, index: int, call: Call) -> None:
        """The call succeeded."""


class Shim:
    """The calls seen so far, and the hook that each passes through."""

    def __init__(self, root: Path, hook: Hook) -> None:
        self.root, self.hook, self.calls = os.path.realpath(root), hook, []  # type: tuple[str, Hook, list[Call]]
        self._asking = False

    def run(self, name: str, targets: tuple[str, ...], act: Callable[[int | None], Any]) -> Any:
        """Perform a call; `act(limit)` does it."""
        inside = [target for target in targets if target == self.root or target.startswith(self.root + os.sep)]
        if not inside or self._asking:
            return act(None)
        call = Call(name, targets, _site())
        self.calls.append(call)
        index = len(self.calls)
        limit = self._ask(self.hook.before, index, call)
        result = act(limit)
        self._ask(self.hook.after, index, call)
        return result

    def _ask(self, hook: Callable[[int, Call], Any], index: int, call: Call) -> Any:
        self._asking = True  # what a hook itself does is not counted
        try:
            return hook(index, call)
        finally:
            self._asking = False


def _site() -> tuple[str, ...]:
    """file:line of the frames that belong to what is tested."""
    found, frame = [], sys._getframe(3)
    while frame is not None:
        name = frame.f_code.co_filename
        if f"{os.sep}stages{os.sep}" in name:
            found.append(f"{name.rpartition(f'{os.sep}stages{os.sep}')[2]}:{frame.f_lineno} {frame.f_code.co_name}")
        frame = frame.f_back  # type: ignore[assignment]
    return tuple(reversed(found))


def place(target: Any, folder: int | None = None) -> str:
    """The absolute path that a path or a handle stands for; links in its last part are not followed."""
    if isinstance(target, int):
        try:
            return os.readlink(f"/proc/self/fd/{target}").removesuffix(" (deleted)")
        except OSError:
            return ""
    text = os.fsdecode(target)
    if not os.path.isabs(text):
        text = os.path.join(place(folder) if folder is not None else os.getcwd(), text)
    head, tail = os.path.split(os.path.normpath(text))
    return os.path.join(os.path.realpath(head), tail)


class _CountedFile(io.FileIO):
    """A file whose every write(2) passes through the shim."""

    def __init__(self, shim: Shim, file: Any, mode: str, closefd: bool, opener: Any) -> None:
        self._shim = shim
        if isinstance(file, int) or opener is not None:
            super().__init__(file, mode, closefd, opener)
        else:
            shim.run("open", (place(file),), lambda limit: super(_CountedFile, self).__init__(file, mode, closefd, opener))
        self._place = place(self.fileno())

    def write(self, content: Any) -> int | None:
        whole = memoryview(content).cast("B")
        return self._shim.run("write", (self._place,), lambda limit: super(_CountedFile, self).write(whole if limit is None else whole[:limit]))

    def truncate(self, size: int | None = None) -> int:
        return self._shim.run("ftruncate", (self._place,), lambda limit: super(_CountedFile, self).truncate(size))


def _opener(shim: Shim) -> Callable[..., Any]:
    def opened(file: Any, mode: str = "r", buffering: int = -1, encoding: Any = None, errors: Any = None, newline: Any = None, closefd: bool = True, opener: Any = None) -> Any:
        if not set(mode) & set("wax+"):
            if isinstance(file, int):
                return _OPEN(file, mode, buffering, encoding, errors, newline, closefd, opener)
            return shim.run("read", (place(file),), lambda limit: _OPEN(file, mode, buffering, encoding, errors, newline, closefd, opener))
        raw = _CountedFile(shim, file, mode.replace("b", "").replace("t", ""), closefd, opener)
        if buffering == 0:
            return raw
        size = buffering if buffering > 1 else io.DEFAULT_BUFFER_SIZE
        buffered: Any = io.BufferedRandom(raw, size) if "+" in mode else io.BufferedWriter(raw, size)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding, errors, newline, line_buffering=buffering == 1)

    return opened


def _guarded(shim: Shim, name: str) -> Callable[..., Any]:
    real, described = _REAL[name], _CALLS[name]

    def call(*args: Any, **kwargs: Any) -> Any:
        targets = tuple(place(args[at], kwargs.get(folder) if folder else None) for at, folder in described)

        def act(limit: int | None) -> Any:
            return real(*(args if limit is None else _shortened(name, args, limit)), **kwargs)

        reads = name == "open" and not args[1] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        return shim.run("read" if reads else name, targets, act)

    return call


def _shortened(name: str, args: tuple[Any, ...], limit: int) -> tuple[Any, ...]:
    if name in ("write", "pwrite"):
        return (args[0], memoryview(args[1])[:limit], *args[2:])
    if name == "sendfile":
        return (*args[:3], min(limit, args[3]))
    if name == "copy_file_range":
        return (*args[:2], min(limit, args[2]), *args[3:])
    return args


@contextmanager
def watching(root: Path, hook: Hook) -> Iterator[Shim]:
    """All calls of this process below `root` pass through `hook` while the context is open."""
    shim = Shim(root, hook)

    def ioctl(handle: Any, request: int, *args: Any) -> Any:
        number = handle if isinstance(handle, int) else handle.fileno()
        return shim.run("ioctl", (place(number),), lambda limit: _IOCTL(handle, request, *args))

    before = {name: getattr(os, name) for name in _REAL}
    try:
        for name in _REAL:
            setattr(os, name, _guarded(shim, name))
        builtins.open = io.open = _opener(shim)  # type: ignore[assignment]
        fcntl.ioctl = ioctl  # type: ignore[assignment]
        yield shim
    finally:
        for name, real in before.items():
            setattr(os, name, real)
        builtins.open = io.open = _OPEN
        fcntl.ioctl = _IOCTL


def writes(call: Call) -> bool:
    """Whether a call puts bytes into a file."""
    return call.name in _WRITES
