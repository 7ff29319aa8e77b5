"""One line of RELIABILITY.md: what is measured, what is wanted, and what came out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Measured:
    """What came out of a case. `detail`: one line on how (counts, what was injected, what failed)."""

    value: str | float | int
    ok: bool
    detail: str = ""


@dataclass(frozen=True)
class Case:
    """`run(folder, seed, quick)`: an empty folder of its own on a real disk; every random choice follows from the seed;
    quick: a small version of the same, which shows that it runs. `where`: what the faults were injected into: "real processes", "in-process shim" …"""

    name: str
    target: str
    run: Callable[[Path, int, bool], Measured]
    where: str
