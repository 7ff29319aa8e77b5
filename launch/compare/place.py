"""Where a comparison works: OUTPUT/.compare, on the disk that the run's own results would go to, and gone when it ends."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from stages.claim import Claim

NAME = ".compare"


@contextlib.contextmanager
def working(output: Path, say: Callable[[str], None]) -> Iterator[Path]:
    """A folder in `output`, empty at first and removed at the end, whatever ends the block; who holds it removes what one that was killed has left there.

    Raises:
        UserError: another comparison works there, or it can't be written.
    """
    folder = output / NAME
    made = [place for place in (output, *output.parents) if not place.exists()]
    try:
        with Claim(folder, "align sft --compare") as claim:
            if any(path != claim.folder for path in folder.iterdir()):
                say(f"removing what a comparison that was killed has left in {folder}")
                _empty(folder, claim.folder)
            try:
                yield folder
            finally:
                _empty(folder, claim.folder)
    finally:
        for place in (folder / ".lock", folder, *made):
            with contextlib.suppress(OSError):  # something else is in it
                place.rmdir()


def _empty(folder: Path, but: Path) -> None:
    for path in folder.iterdir():
        if path != but:
            shutil.rmtree(path, ignore_errors=True)
