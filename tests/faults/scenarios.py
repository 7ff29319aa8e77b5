"""What is interrupted: each scenario prepares a registry, then does something with it that must hold whatever happens."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from unittest import mock

import numpy as np
from safetensors.numpy import save

from configs.errors import UserError
from stages.registry import Checkpoint, Registry, gc, storage
from stages.registry.gc import Rules
from tests.faults import run_saves
from tests.faults.promises import Promises, broken
from tests.tiny import tiny_model

Note = Callable[[], None]  # to be called after each acknowledgement


def writer(value: float, same: bytes = b"shared by all" * 40) -> Callable[[Path], None]:
    """Weights, a config, a file that every checkpoint has, and one in a sub-folder; written through Python, so that a shim sees each write."""

    def write(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(save({"weight": np.full((4, 3), value, np.float32)}))
        (folder / "config.json").write_text(json.dumps({"value": value}))
        (folder / "tokenizer.json").write_bytes(same)
        (folder / "extra").mkdir()
        (folder / "extra" / "notes.txt").write_text("ok")

    return write


def publish(root: Path, promises: Promises, note: Note, value: float = 1.0, family: str = "sft/demo") -> Checkpoint:
    """Publish and note the promise."""
    stage, name = family.split("/")
    made = Registry(root).publish(stage, name, writer(value))
    promises.published(made)
    note()
    return made


def move(root: Path, promises: Promises, note: Note, ref: str, alias: str = "production", expect: str | None = None) -> None:
    """Move an alias of sft/demo and note the promise."""
    promises.moved(f"sft/demo@{alias}", Registry(root).set_alias("sft/demo", alias, ref, expect))
    note()


@dataclass(frozen=True)
class Scenario:
    """`prepare` runs undisturbed, `act` is what is interrupted. Both add to the promises, `act` with a note after each.

    after: what a second process may do when a first was killed in `act`.
    """

    name: str
    prepare: Callable[[Path, Promises], None]
    act: Callable[[Path, Promises, Note], None]
    after: tuple[Callable[[Path, Promises, Note], None], ...] = ()


def silent() -> None:
    """No note."""


def _open(root: Path, promises: Promises, note: Note) -> None:
    Registry(root)
    promises.opened = True
    note()


def _open_in_new_folder(root: Path, promises: Promises, note: Note) -> None:
    """In a folder that somebody has just made and that nobody has synced."""
    with suppress(OSError):  # whose disk is full: the registry is to say so
        root.mkdir()
    _open(root, promises, note)
    publish(root, promises, note)


def _empty(root: Path, promises: Promises) -> None:
    _open(root, promises, silent)


def _one(root: Path, promises: Promises) -> None:
    publish(root, promises, silent)


def _two(root: Path, promises: Promises) -> None:
    publish(root, promises, silent)
    publish(root, promises, silent, 2.0)


def _aliased(root: Path, promises: Promises) -> None:
    _two(root, promises)
    move(root, promises, silent, "sft/demo@1")


def _first(root: Path, promises: Promises, note: Note) -> None:
    publish(root, promises, note)
    move(root, promises, note, "sft/demo@1", expect="")


def _next(root: Path, promises: Promises, note: Note) -> None:
    publish(root, promises, note, 2.0)


def _moves(root: Path, promises: Promises, note: Note) -> None:
    move(root, promises, note, "sft/demo@2", expect="sft/demo@1")
    move(root, promises, note, "sft/demo@1")


def _nothing(root: Path, promises: Promises) -> None:
    return None


def _another(root: Path, promises: Promises, note: Note) -> None:
    move(root, promises, note, publish(root, promises, note, 5.0).ref, "another")


def _point_at_newest(root: Path, promises: Promises, note: Note) -> None:
    """An alias to whatever is visible, also to what its publisher never acknowledged."""
    if Registry(root).list():
        move(root, promises, note, "sft/demo", "newest")


RULES = Rules(keep=2, grace=timedelta(0))


def collect(root: Path, rules: Rules = RULES) -> None:
    """gc as it would run an hour from now, so that the time of grace is over for what lies in the trash."""
    registry = Registry(root)
    gc.apply(registry, gc.make_plan(registry, rules, at=datetime.now(UTC) + timedelta(hours=1)))


def _garbage(root: Path, promises: Promises) -> None:
    """Version 1 has an alias, 2 is in the trash, 3 is about to go there, 4 and 5 stay."""
    made = [publish(root, promises, silent, value) for value in (1.0, 2.0, 3.0)]
    move(root, promises, silent, "sft/demo@1")
    made.append(publish(root, promises, silent, 4.0))
    collect(root)
    publish(root, promises, silent, 5.0)
    promises.released = {made[1].id, made[2].id}


def _collect(root: Path, promises: Promises, note: Note) -> None:
    collect(root)
    registry = Registry(root)
    third = next(key for key, ref in promises.checkpoints.items() if ref == "sft/demo@3")
    registry.restore(third)
    promises.released.discard(third)
    note()


def _collect_again(root: Path, promises: Promises, note: Note) -> None:
    collect(root)
    _another(root, promises, note)


SCENARIOS = (
    Scenario("open", _nothing, _open, (_another,)),
    Scenario("first publish and alias", _empty, _first, (_another, _point_at_newest)),
    Scenario("publish", _one, _next, (_another, _point_at_newest)),
    Scenario("alias", _aliased, _moves, (_another, _point_at_newest)),
    Scenario("gc and restore", _garbage, _collect, (_collect_again,)),
    Scenario("open in a folder just made", _nothing, _open_in_new_folder, (_another,)),
)

# By themselves: they load torch.
SAVES = Scenario("saves of a run", run_saves.begin, run_saves.train, (run_saves.train_on,))
STATES = Scenario("keep and restore", run_saves.published, run_saves.keep_and_restore)


def go_on(root: Path, promises: Promises) -> list[str]:
    """What does not work any more: the next publication, the next move of an alias, and all that had been promised."""
    promises = promises.copy()
    if promises.saves:
        problems = run_saves.go_on_saves(root.parent, promises)
        if problems or not promises.opened:  # a run without a registry
            return problems
    try:
        made = publish(root, promises, silent, 9.0)
        if any(ref == made.ref for key, ref in promises.checkpoints.items() if key != made.id):
            return [f"{made.ref} was given out twice"]
        if Registry(root).resolve("sft/demo").id != made.id:
            return [f"{made.ref} was published and is not the newest"]
        move(root, promises, silent, made.ref, alias="after")
    except UserError as error:
        return [f"the next operation fails: {error}"]
    return broken(root, promises)


def as_new_process() -> None:
    """Forget what this process knows of a registry's folders."""
    storage._durable.clear()


@contextmanager
def memory(fallback: Path) -> Iterator[Path]:
    """A folder in memory where there is room, else in `fallback`. For whoever is killed the disk plays no part: what the kernel has, it keeps."""
    shared = Path("/dev/shm")
    roomy = os.access(shared, os.W_OK) and shutil.disk_usage(shared).free > 2**29
    with tempfile.TemporaryDirectory(dir=shared if roomy else fallback) as made:
        yield Path(made)


@contextmanager
def light() -> Iterator[None]:
    """No git and no look at the installed libraries for each manifest: they take most of the time and write nothing."""
    facts = {"_git": lambda *args: None, "library_versions": dict}
    with mock.patch.multiple("stages.registry.provenance", **facts):
        yield


def _outside(root: Path, promises: Promises) -> None:
    """A Hugging Face folder beside a registry that holds a checkpoint."""
    tiny_model(root.parent / "outside")
    publish(root, promises, silent)


def _import(root: Path, promises: Promises, note: Note) -> None:
    from stages.registry.importing import import_model

    promises.published(import_model(Registry(root), str(root.parent / "outside"), "sft/imported"))
    note()


IMPORT = Scenario("import", _outside, _import)  # by itself: it loads torch and transformers, and takes half a second each time
