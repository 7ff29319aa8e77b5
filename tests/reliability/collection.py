"""Garbage collection beside everything else that uses a registry at the same time, with processes killed at random."""

from __future__ import annotations

import json
import os
import random
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Any

from configs.errors import UserError
from stages.registry import Checkpoint, Parent, Registry, gc, provenance
from stages.registry.trash import RECORDS
from tests.reliability.case import Case, Measured
from tests.unit.registry_samples import publish

FAMILIES = ("sft/a", "sft/b")
RULES = gc.Rules(keep=2, grace=timedelta(0))  # what one run moves away is deleted by the next: nothing waits
REFUSED = ("no checkpoint", "removed from", "has no version")  # it was gone before anything was written: an honest answer
Tell = Callable[..., None]


def publisher(registry: Registry, draw: random.Random, tell: Tell) -> None:
    """Publish from a parent that it holds a lease on, as a stage does."""
    some = registry.list("sft", draw.choice("ab"))
    parent = draw.choice(some) if some and draw.random() < 0.5 else None
    held = registry.lease(parent, "test") if parent else None
    made = publish(registry, draw.choice(FAMILIES), draw.random(), [Parent.of(parent, "init_from")] if parent else [])
    tell(did="published", id=made.id, family=f"{made.stage}/{made.name}", version=made.version)
    if held:
        held.give_back()


def mover(registry: Registry, draw: random.Random, tell: Tell) -> None:
    """Move an alias to any checkpoint, also to one that gc is about to take."""
    if target := _any(registry, draw):
        registry.set_alias(f"{target.stage}/{target.name}", draw.choice(("production", "candidate")), target.id)
        tell(did="moved", id=target.id)


def trainer(registry: Registry, draw: random.Random, tell: Tell) -> None:
    """Hold a lease and look at every byte again and again."""
    if not (target := _any(registry, draw)):
        return
    held = registry.lease(target, "test")
    for _ in range(draw.randrange(1, 20)):
        if problems := registry.verify(target.id, deep=True):
            tell(wrong=f"{target.ref} changed under a lease: {problems[0]}")
        time.sleep(0.01)
    tell(did="held")
    if held:
        held.give_back()


def collector(registry: Registry, draw: random.Random, tell: Tell) -> None:
    """Collect garbage."""
    done = gc.apply(registry, gc.make_plan(registry, RULES, deep=True))
    tell(did="collected", trashed=len(done.trashed), purged=len(done.purged), saved=len(done.saved) + len(done.returned))


def _any(registry: Registry, draw: random.Random) -> Checkpoint | None:
    some = registry.list("sft", draw.choice("ab"))
    return draw.choice(some) if some else None


ROLES = (publisher, publisher, mover, mover, mover, trainer, collector, collector)


def start(role: Callable[..., None], root: Path, file: Path, seed: int) -> int:
    """Fork a process that does its part until it is killed, and writes down what was acknowledged; its PID."""
    child = os.fork()
    if child:
        return child
    try:
        registry, draw, out = Registry(root), random.Random(seed), open(file, "a", buffering=1)  # noqa: SIM115 - until it is killed
        provenance._git = lambda *_: None  # type: ignore[assignment]  # asking git would take most of the time

        def tell(**entry: Any) -> None:
            out.write(json.dumps(entry) + "\n")

        while True:
            try:
                role(registry, draw, tell)
            except UserError as error:
                tell(**({"did": "refused"} if any(text in str(error) for text in REFUSED) else {"wrong": f"{role.__name__}: {error}"}))
            except Exception:
                tell(wrong=f"{role.__name__}: {traceback.format_exc(limit=-2)}")
    finally:
        os._exit(1)


def beside(folder: Path, seed: int, quick: bool) -> Measured:
    """Publishers, alias movers and a job that holds leases beside two gc that delete at once; every 0.3 s one of them is killed and started again."""
    registry, draw, numbers = Registry(folder / "registry"), random.Random(seed), count()
    seconds, killed = (5 if quick else 40), 0

    def begin(role: Callable[..., None]) -> int:
        number = next(numbers)
        return start(role, registry.root, folder / f"{number}.jsonl", seed + number)

    running = {begin(role): role for role in ROLES}
    end = time.monotonic() + seconds
    try:
        while time.monotonic() < end:
            time.sleep(0.3)
            victim = draw.choice(list(running))
            os.kill(victim, signal.SIGKILL)
            killed += os.WTERMSIG(os.waitpid(victim, 0)[1]) == signal.SIGKILL
            running[begin(role)] = (role := running.pop(victim))
    finally:
        for process in running:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
    told = [json.loads(line) for file in sorted(folder.glob("*.jsonl")) for line in file.read_text().splitlines() if line.endswith("}")]
    wrong = [*(entry["wrong"] for entry in told if "wrong" in entry), *lost(registry, told)]
    did = Counter(entry["did"] for entry in told if "did" in entry)
    moved = {key: sum(entry.get(key, 0) for entry in told) for key in ("trashed", "purged", "saved")}
    enough = min(did["published"], did["moved"], did["held"], moved["trashed"], moved["purged"]) > 0
    done = f"{did['published']} published, {did['moved']} alias moves, {did['held']} leases, {did['refused']} refused; " + ", ".join(f"{n} {key}" for key, n in moved.items())
    return Measured(len(wrong), not wrong and enough, f"{done}; {killed} kills in {seconds} s{f'; first: {wrong[0]}' if wrong else ''}")


def lost(registry: Registry, told: list[dict[str, Any]]) -> list[str]:
    """What should be there and is not, once every process has ended and gc has run once more."""
    gc.apply(registry, gc.make_plan(registry, RULES, deep=True))
    there = {item.id: item for item in registry.list()}
    wrong = [f"{key} is damaged" for key in registry.damaged()]
    wrong += [f"{item.ref} does not verify" for item in there.values() if registry.verify(item.id, deep=True)]
    wrong += [f"the parent {parent} of {item.ref} is gone" for item in there.values() for parent in item.parent_ids if parent not in there]
    for family in gc.alias_families(registry.root):
        wrong += [f"{family}@{alias} leads nowhere" for alias, target in registry.aliases(family).items() if target not in there]
    published = [entry for entry in told if entry.get("did") == "published"]
    for family in FAMILIES:
        newest = sorted((entry for entry in published if entry["family"] == family), key=lambda entry: entry["version"])[-1:]
        wrong += [f"{family}@{entry['version']}, the newest that was acknowledged, is gone" for entry in newest if _overtaken(registry, family, entry) < RULES.keep and entry["id"] not in there]
    records = registry.root / "trash" / RECORDS
    recorded = set(os.listdir(records)) if records.is_dir() else set()
    return wrong + [f"{entry['id']} is gone without a record" for entry in published if entry["id"] not in there and entry["id"] not in recorded]


def _overtaken(registry: Registry, family: str, entry: dict[str, Any]) -> int:
    """How many newer versions there are: of publishers that were killed before they could write down that they were done."""
    return sum(item.version > entry["version"] for item in registry.list(*family.split("/")))


CASES = [Case("gc beside publishers and alias movers", "0 kept checkpoints lost", beside, "real processes, killed at random")]
