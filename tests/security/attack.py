"""An attack on our own loaders: what it plants is harmless and tells by a file that it was run."""

from __future__ import annotations

import io
import json
import os
import shutil
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from configs.errors import UserError

REFUSED, HARMLESS = "refused", "harmless"  # ends in a UserError, or comes to its end with no effect
PATIENCE = 30.0  # seconds an attack may take: what hangs has succeeded


class Planted:
    """Unpickled, it makes a folder at `canary`: the one thing an attack of these tests does."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.canary),)


@dataclass
class Place:
    """Where one attack takes place: an empty folder, the canary that must not appear, and a sound model to start from."""

    folder: Path
    sound: Path

    @property
    def canary(self) -> Path:
        """Appears if code of the attacker's was run."""
        return self.folder / "CANARY"

    @cached_property
    def code(self) -> str:
        """A Python module that leaves the canary when it is imported."""
        return f"import os\nos.makedirs({str(self.canary)!r}, exist_ok=True)\n"

    @property
    def planted(self) -> Planted:
        return Planted(self.canary)

    def model(self, name: str = "model", **config: Any) -> Path:
        """A copy of the sound model folder; `config` goes into its config.json."""
        copy = self.folder / name
        shutil.copytree(self.sound, copy)
        if config:
            self.settings(copy / "config.json", **config)
        return copy

    def settings(self, file: Path, **values: Any) -> Path:
        """Add keys to a JSON file."""
        found = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps(found | values))
        return file

    def write(self, name: str, content: str | bytes) -> Path:
        """A file in the folder."""
        file = self.folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.encode() if isinstance(content, str) else content)
        return file

    def torch_save(self, file: Path, value: Any = None) -> Path:
        """The payload (or `value`) as torch.save writes it."""
        import torch

        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"state": self.planted if value is None else value}, file)
        return file

    def zip_of(self, *entries: tuple[str, bytes]) -> bytes:
        """A zip file of entries, names twice if they are given twice."""
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w") as archive:
            for name, content in entries:
                archive.writestr(zipfile.ZipInfo(name), content)
        return stream.getvalue()


@dataclass(frozen=True)
class Attack:
    """`run(place)` tries it on what people use: `target` in words. `says`: a part of the refusal."""

    name: str
    target: str
    expected: str
    run: Callable[[Place], Any]
    says: str = ""


@dataclass(frozen=True)
class Outcome:
    """What came of an attack. `wrong`: why that is not what was expected; empty is good."""

    executed: bool
    ended: str
    seconds: float
    wrong: str


def attempt(attack: Attack, folder: Path, sound: Path) -> Outcome:
    """Try one attack in this process."""
    folder.mkdir(parents=True)
    place = Place(folder, sound)
    started = time.monotonic()
    try:
        attack.run(place)
        ended, said = HARMLESS, ""
    except UserError as error:
        ended, said = REFUSED, str(error)
    except Exception as error:  # a traceback is no answer to a person
        ended, said = f"{type(error).__name__}: {str(error)[:200]}", ""
    seconds = time.monotonic() - started
    wrong = []
    if place.canary.exists():
        wrong.append("it was executed")
    if ended != attack.expected:
        wrong.append(f"ended otherwise: {ended}; expected: {attack.expected}")
    elif attack.says not in said:
        wrong.append(f"the refusal says something else: {said[:300]}")
    if seconds > PATIENCE:
        wrong.append(f"it took {seconds:.0f} s")
    return Outcome(place.canary.exists(), ended, seconds, "; ".join(wrong))
