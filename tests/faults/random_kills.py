"""kill -9 at random moments of a real process that publishes, and moves an alias, in a loop. Run as a module: prints one JSON object.

The parent forks the publishers and has loaded no torch, so that a kill costs milliseconds. It publishes nothing itself: only what a publisher said
through its pipe before it was killed counts as acknowledged. A kill falls a drawn part of an operation after a drawn acknowledgement, not a drawn
time after the fork, so that on a machine under load too publications and moves are hit all along.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import statistics
import sys
import time
from collections import deque
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from stages.registry import Registry
from stages.registry.gc import Rules
from tests.faults.promises import Promises, broken, leftovers
from tests.faults.scenarios import as_new_process, collect, go_on, light, writer

ROUND = 40  # kills before a fresh registry: each look at one takes as long as it is large
MOST = 3  # acknowledgements that a publisher may send before its kill is due
BEYOND = 1.25  # a kill falls within this multiple of what its operation usually takes: some operations get through
PACES = {"checkpoint": deque([0.01], 40), "alias": deque([0.002], 40)}  # seconds that publishers took of late, by what they acknowledged


def publishing(root: Path, pipe: int) -> None:
    """Publish and move an alias in turn until killed; each acknowledgement is one line with its time, written at once."""
    registry = Registry(root)
    said = partial(_say, pipe)
    said("ready")
    for number in range(10**9):
        made = registry.publish("sft", "demo", writer(float(number)))
        said("checkpoint", made.id, made.ref)
        registry.set_alias("sft/demo", "production", made.id)
        said("alias", made.id)


def _say(pipe: int, *words: str) -> None:
    os.write(pipe, f"{time.monotonic()} {' '.join(words)}\n".encode())


def kill_after(root: Path, acknowledged: int, part: float) -> list[list[str]]:
    """Start a publisher and kill it that part of an operation's usual time after so many acknowledgements; all that it had sent, "ready" first."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            as_new_process()
            publishing(root, writing)
        finally:
            os._exit(9)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        lines = [pipe.readline().split() for _ in range(1 + acknowledged)]
        time.sleep(part * statistics.median(PACES["alias" if acknowledged % 2 else "checkpoint"]))
        os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        lines += [line.split() for line in pipe]
    assert os.WIFSIGNALED(status), f"the publisher failed by itself (exit status {os.WEXITSTATUS(status)})"
    for before, line in itertools.pairwise(lines[: 1 + acknowledged]):
        PACES[line[1]].append(float(line[0]) - float(before[0]))
    return [line[1:] for line in lines]


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
    known.update(there)
    return found, len(there)


def rounds(folder: Path, count: int, seed: int) -> Iterator[dict[str, Any]]:
    """One fresh registry after the other, each with up to ROUND kills."""
    chance = random.Random(seed)
    for start in range(0, count, ROUND):
        root = folder / "registry"
        promises, known, problems, visible, hit = Promises(opened=True), set[str](), list[str](), 0, [0, 0]
        for _ in range(min(ROUND, count - start)):
            said = kill_after(root, chance.randint(0, MOST), chance.uniform(0, BEYOND))
            for kind, key, *ref in said[1:]:
                if kind == "checkpoint":
                    promises.checkpoints[key] = ref[0]
                else:
                    promises.aliases.setdefault("production", []).append(key)
            hit[(len(said) - 1) % 2] += 1
            wrong, visible = look(root, promises, known)
            problems += wrong
        left = len(leftovers(root))
        moves = len(promises.aliases.get("production", []))
        problems += broken(root, Promises(True, promises.checkpoints)) + go_on(root, Promises(True, promises.checkpoints))
        collect(root, Rules(keep=10**6))
        problems += [f"gc leaves {name}" for name in leftovers(root)]
        yield {
            "kills": sum(hit), "publishing": hit[0], "moving": hit[1], "checkpoints": len(promises.checkpoints), "moves": moves,
            "unacknowledged": visible - len(promises.checkpoints), "leftovers": left, "problems": problems,
        }  # fmt: skip
        shutil.rmtree(root)


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
