"""Files of lines that a run appends to, on a disk that may be full: what can't be written now is kept and written when there is room again."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from stages.training.ranks import say


class Appended:
    """A text file that whole lines are appended to (rank 0)."""

    def __init__(self, path: Path) -> None:
        self.path, self.waiting = path, ""

    def add(self, text: str) -> None:
        """Append `text`, which ends with a line end, and what waits before it. No OSError gets out: a full disk must not end a training."""
        before, self.waiting = self.waiting, self.waiting + text
        try:
            self._write()
        except OSError as error:
            if not before:
                say(f"warning: {self.path} can't be written ({error.strerror}); its lines are kept in memory and written once there is room")

    def flush(self) -> None:
        """Try again to write what waits."""
        if self.waiting:
            self.add("")

    def _write(self) -> None:
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("a", encoding="utf-8") as stream:
                stream.write(self.waiting)
        except OSError:
            with suppress(OSError):
                os.truncate(self.path, size)  # no half of a line is left
            raise
        self.waiting = ""
