"""What the folders of a run's saves are called: which are its own, and which somebody else's, left alone."""

from __future__ import annotations

import re
from pathlib import Path

# Before the name of a save: being written; being removed; of the same name as one that is not proven yet; found damaged.
STAGING, TRASH, FORMER, ASIDE = ".staging-", ".trash-", ".former-", "damaged-"
IDENTITY = "identity.json"  # beside saves of before, whose seals did not say what they depend on
SAVE = re.compile(r"checkpoint-(0|[1-9][0-9]*)")
BEST = re.compile(r"best-(0|[1-9][0-9]*)")  # a policy that PPO may publish
DAMAGED = re.compile(rf"{ASIDE}(?:{SAVE.pattern}|{BEST.pattern})(?:\.[0-9]+)?")


def saves(folder: Path) -> list[Path]:
    """The saves of a run, newest first, sound or not. A copy such as checkpoint-40-backup is none."""
    found = [path for path in folder.glob("checkpoint-*") if SAVE.fullmatch(path.name) and path.is_dir() and not path.is_symlink()]
    return sorted(found, key=number_of, reverse=True)


def number_of(save: Path) -> int:
    """The step or iteration that a save was made after: 40 of checkpoint-40."""
    named = SAVE.fullmatch(save.name)
    assert named is not None, f"{save.name} is not the name of a save"
    return int(named[1])


def put_aside(folder: Path) -> list[tuple[Path, int]]:
    """The damaged saves that were put aside (damaged-checkpoint-40, damaged-checkpoint-40.2), with their numbers."""
    named = [(path, DAMAGED.fullmatch(path.name)) for path in folder.glob(f"{ASIDE}checkpoint-*")]
    return [(path, int(found[1])) for path, found in named if found]


def is_own(name: str) -> bool:
    """Whether a run makes entries of this name in the folder of its saves."""
    return name.startswith((STAGING, TRASH, FORMER)) or name == IDENTITY or any(kind.fullmatch(name) for kind in (SAVE, BEST, DAMAGED))
