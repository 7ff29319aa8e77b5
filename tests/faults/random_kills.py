"""kill -9 at random moments of a real process that publishes, and moves an alias, in a loop. Run as a module: prints one JSON object.

The parent forks the publishers and has loaded no torch, so that a kill costs milliseconds. What a publisher acknowledges goes through a pipe.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stages.registry import Checkpoint, Registry
from stages.registry.gc import Rules
from tests.faults.promises import Promises, broken, leftovers
from tests.faults.scenarios import as_new_process, collect, go_on, light, writer

ROUND = 40  # kills before a fresh registry: each look at one takes as long as it is large


def publishing(root: Path, pipe: int) -> None:
    """Publish and move an alias until killed; each acknowledgement is one line, written at once."""
    registry = Registry(root)
    for number in range(10**9):
        made = registry.publish("sft", "demo", writer(float(number)))
        os.write(pipe, f"checkpoint {made.id} {made.ref}\n".encode())
        if number % 2:
            registry.set_alias("sft/demo", "production", made.id)
            os.write(pipe, f"alias {made.id}\n".encode())


def kill_after(root: Path, seconds: float) -> list[list[str]]:
    """Start a publisher, kill it after that time; the acknowledgements it had sent."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            as_new_process()
            publishing(root, writing)
        finally:
            os._exit(9)
    os.close(writing)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    with os.fdopen(reading) as pipe:
        said = [line.split() for line in pipe]
    assert os.WIFSIGNALED(status), f"the publisher failed by itself (exit status {os.WEXITSTATUS(status)})"
    return said


def look(root: Path, promises: Promises, known: set[str]) -> tuple[list[str], int]:
    """What does not hold after a kill, and how many checkpoints are visible; what was deeply verified before is verified quickly."""
    registry = Registry(root, create=False)
    found = [f"{name} is visible and damaged: {problem}" for name, problem in registry.damaged().items()]
    there = {item.id: item for item in registry.list()}
    for key, item in there.items():
        found += [f"{item.ref} is not whole: {problem}" for problem in registry.verify(key, deep=key not in known)]
    found += [f"acknowledged, and lost: {ref}" for key, ref in promises.checkpoints.items() if key not in there or there[key].ref != ref]
    versions = [item.version for item in there.values()]
    if len(set(versions)) != len(versions):
        found.append("a version was given out twice")
    history = [entry["id"] for entry in registry.alias_history("sft/demo", "production")]
    moves = iter(history)
    if not all(move in moves for move in promises.aliases.get("production", [])):
        found.append("an acknowledged move of the alias is lost, or out of order")
    known |= there.keys()
    return found, len(there)


def rounds(folder: Path, count: int, seed: int) -> Iterator[dict[str, Any]]:
    """One fresh registry after the other, each with up to ROUND kills."""
    chance = random.Random(seed)
    for start in range(0, count, ROUND):
        root = folder / "registry"
        promises, known, problems, unsure, visible = Promises(opened=True), set[str](), list[str](), 0, 0
        typical = _typical(root, promises)
        for _ in range(min(ROUND, count - start)):
            for kind, key, *ref in kill_after(root, chance.uniform(0, 1.6 * typical)):
                if kind == "checkpoint":
                    promises.checkpoints[key] = ref[0]
                else:
                    promises.aliases.setdefault("production", []).append(key)
            wrong, visible = look(root, promises, known)
            problems += wrong
        left = len(leftovers(root))
        unsure = visible - len(promises.checkpoints)
        moves = len(promises.aliases.get("production", []))
        problems += broken(root, Promises(True, promises.checkpoints)) + go_on(root, Promises(True, promises.checkpoints))
        collect(root, Rules(keep=10**6))
        problems += [f"gc leaves {name}" for name in leftovers(root)]
        yield {"kills": min(ROUND, count - start), "checkpoints": len(promises.checkpoints), "moves": moves, "unacknowledged": unsure, "leftovers": left, "problems": problems}
        shutil.rmtree(root)


def _typical(root: Path, promises: Promises) -> float:
    """Seconds that a publication takes here."""
    registry, began = Registry(root), time.monotonic()
    made: Checkpoint | None = None
    for value in (1.0, 2.0):
        made = registry.publish("sft", "demo", writer(value))
        promises.published(made)
    return (time.monotonic() - began) / 2


def main(folder: Path, count: int, seed: int) -> dict[str, Any]:
    """The sums over all rounds."""
    total: dict[str, Any] = {}
    with light():
        for made in rounds(folder, count, seed):
            for key, value in made.items():
                total[key] = total.get(key, type(value)()) + value
            with contextlib.suppress(OSError):
                print(f"{total['kills']} kills, {len(total['problems'])} problems", file=sys.stderr, flush=True)
    return total


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
