"""What is interrupted of a run's own saves: made, made again under the same name, kept beside a published checkpoint, written out again.

The working folder lies beside the registry. Every save is of small files, one of them below a folder that holds nothing but a folder, as
DeepSpeed's are; its content tells which step wrote it, and in which attempt.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

from stages.registry import Registry, resumable
from stages.registry.integrity import check
from stages.registry.names import is_id
from stages.training import resume, saves
from stages.training.ranks import process_group
from stages.training.save_names import STAGING, TRASH, number_of
from tests.faults.promises import Promises

RUN, AGAIN = "runs/demo/resume", "runs/again/resume"
IDENTITY = {"data": "x"}


def writer(step: int, attempt: int) -> Callable[[Path], None]:
    """What writes a save, through Python, so that a shim sees each write."""

    def write(staging: Path) -> None:
        (staging / "trainer_state.json").write_text(f"{step} {attempt}")
        (staging / "global_step" / "shards").mkdir(parents=True)
        (staging / "global_step" / "shards" / "optimizer-0.pt").write_bytes(b"moments" * 20)

    return write


def store(top: Path, promises: Promises, note: Callable[[], None], step: int, attempt: int = 1, where: str = RUN) -> None:
    """Make a save as a run does, whose working folder is there by then, and note the promise."""
    (top / where).parent.mkdir(parents=True, exist_ok=True)
    why = saves.store(top / where, f"checkpoint-{step}", writer(step, attempt), IDENTITY)
    assert why is None, why
    promises.saves.setdefault(where, {})[step] = attempt
    note()


def choose(folder: Path) -> Path | None:
    """What the next start of the run goes on from."""
    with contextlib.redirect_stdout(io.StringIO()):
        return resume.choose_save(folder, SimpleNamespace(allow_changed=[]), IDENTITY)  # type: ignore[arg-type]


def broken_saves(top: Path, promises: Promises) -> list[str]:
    """Saves that were acknowledged and are lost, for all that the next start can find."""
    found = []
    for where, steps in promises.saves.items():
        folder = top / where
        if folder.is_dir():
            saves.settle_all(folder)
        sound = {number_of(save): _attempt(save) for save in saves.saves(folder) if saves.problem(save) is None}
        newest = sorted(steps)[-saves.KEPT :]
        if steps and max(sound, default=-1) < newest[-1]:
            found.append(f"{where}: the save of step {newest[-1]} is lost; sound are {sorted(sound) or 'none'}")
        elif steps and sum(step >= newest[0] for step in sound) < len(newest):
            found.append(f"{where}: of the saves of steps {newest} none is there to fall back to")
        found += [f"{where}: the save of step {step} is of attempt {sound[step]}" for step in steps.keys() & sound.keys() if sound[step] < steps[step]]
    return found


def _attempt(save: Path) -> int:
    step, attempt = map(int, (save / "trainer_state.json").read_text().split())
    assert step == number_of(save), f"{save.name} holds the save of step {step}"
    return attempt


def broken_states(registry: Registry, promises: Promises) -> list[str]:
    """Resumable states beside checkpoints: those that can be seen are whole, those that were acknowledged can be seen."""
    folder = resumable.root_of(registry) / "checkpoints"
    names = [path.name for path in folder.iterdir() if is_id(path.name)] if folder.is_dir() else []
    found = [f"the resumable state of {name} is visible and not whole: {problem}" for name in names for problem in check(folder / name, deep=True)]
    return found + [f"the resumable state of {promises.checkpoints[item]} is lost" for item in sorted(promises.states) if item not in names]


def go_on_saves(top: Path, promises: Promises) -> list[str]:
    """What does not work any more: the next start, the save after it, and all that had been promised."""
    promises = promises.copy()
    for where in promises.saves:
        folder = top / where
        chosen = choose(folder)
        step = 1 + (number_of(chosen) if chosen else 0)
        store(top, promises, lambda: None, step, 9, where)
        if choose(folder) != folder / f"checkpoint-{step}":
            return [f"{where}: checkpoint-{step} was made and is not what the next start goes on from"]
        if left := [path.name for path in folder.iterdir() if path.name.startswith((STAGING, TRASH))]:
            return [f"{where}: {', '.join(left)} is left"]
    return broken_saves(top, promises)


# -- the scenarios


def begin(root: Path, promises: Promises) -> None:
    """A run that has made no save yet."""
    process_group()  # which is no part of what is interrupted
    promises.saves[RUN] = {}


def train(root: Path, promises: Promises, note: Callable[[], None]) -> None:
    """Saves of three steps, of which two stay, and the third again: its step was taken back and taken anew."""
    for step in (1, 2, 3):
        store(root.parent, promises, note, step)
    store(root.parent, promises, note, 3, 2)


def train_on(root: Path, promises: Promises, note: Callable[[], None]) -> None:
    """Resume, and one more save."""
    chosen = choose(root.parent / RUN)
    store(root.parent, promises, note, 1 + (number_of(chosen) if chosen else 0), 3)


def published(root: Path, promises: Promises) -> None:
    """A run that has published two checkpoints, with a save."""
    begin(root, promises)
    for _ in range(2):
        promises.published(Registry(root).publish("sft", "demo", lambda folder: (folder / "config.json").write_text("{}")))
    store(root.parent, promises, lambda: None, 1)


def keep_and_restore(root: Path, promises: Promises, note: Callable[[], None]) -> None:
    """Keep the save beside both checkpoints, by links and, as between two disks, by copies; write the copies out to a folder that somebody has
    just made and nobody has synced."""
    registry = Registry(root)
    for version, linked in ((1, True), (2, False)):
        checkpoint = registry.resolve(f"sft/demo@{version}")
        with contextlib.nullcontext() if linked else mock.patch.object(resumable, "hardlink", return_value=False):
            resumable.keep(registry, checkpoint, root.parent / RUN / "checkpoint-1")
        promises.states.add(checkpoint.id)
        note()
    again = (root.parent / AGAIN).parent
    again.mkdir()
    resumable.restore(registry, "sft/demo@2", again)
    promises.saves[AGAIN] = {1: 1}
    note()
