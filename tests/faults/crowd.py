"""Many processes publish into one registry, then move one alias, all at once. Run as a module: prints one JSON object."""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from configs.errors import UserError
from stages.registry import Registry
from tests.faults.scenarios import as_new_process, light, writer

FAMILY, ALIAS = "sft/demo", "production"


def together(count: int, work: Callable[[int], Sequence[str]]) -> list[str]:
    """Run work(0) … work(count - 1) in a process each, all from one moment on; the lines that each returns at its end."""
    gate_out, gate_in = os.pipe()
    children = []
    for number in range(count):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            status = 9
            try:
                os.close(gate_in)
                os.read(gate_out, 1)  # ends when the parent closes its side
                as_new_process()
                with os.fdopen(writing, "w") as pipe:
                    pipe.writelines(f"{line}\n" for line in work(number))
                status = 0
            finally:
                os._exit(status)
        os.close(writing)
        children.append((child, reading))
    os.close(gate_in)
    said = []
    for child, reading in children:
        with os.fdopen(reading) as pipe:
            said += pipe.read().split("\n")[:-1]
        status = os.waitpid(child, 0)[1]
        assert status == 0, f"a writer ended with status {status}"
    os.close(gate_out)
    return said


def publish_all(root: Path, writers: int, each: int) -> list[str]:
    """What does not hold after writers × each publications."""
    def work(number: int) -> Sequence[str]:
        registry = Registry(root)
        return [registry.publish("sft", "demo", writer(float(number * each + index))).id for index in range(each)]

    acknowledged = together(writers, work)
    registry = Registry(root)
    there = {item.id: item for item in registry.list()}
    problems = [f"{key} is damaged: {problem}" for key, problem in registry.damaged().items()]
    problems += [f"{key}: {problem}" for key in there for problem in registry.verify(key, deep=True)]
    if sorted(item.version for item in there.values()) != list(range(1, writers * each + 1)):
        problems.append(f"the versions are not 1 to {writers * each}, each once")
    if sorted(acknowledged) != sorted(there):
        problems.append("acknowledged and visible are not the same checkpoints")
    return problems


def move_all(root: Path, writers: int, each: int, seed: int) -> tuple[list[str], int]:
    """What does not hold after writers × each compare-and-set moves; and how many were refused and tried again."""
    ids = [item.id for item in Registry(root).list("sft", "demo")]

    def work(number: int) -> Sequence[str]:
        registry, chance, done = Registry(root), random.Random(seed * 1000 + number), []
        tries = 0
        while len(done) < each:
            history = registry.alias_history(FAMILY, ALIAS)
            here, wanted = history[-1]["id"] if history else "", chance.choice(ids)
            tries += 1
            try:
                registry.set_alias(FAMILY, ALIAS, wanted, expect=here)
                done.append(f"{here} {wanted}")
            except UserError as error:
                if "was not moved" not in str(error):
                    raise
                time.sleep(chance.uniform(0, 0.02))
        return [*done, f"tries {tries}"]

    said = together(writers, work)
    moves = [line for line in said if not line.startswith("tries")]
    history = Registry(root).alias_history(FAMILY, ALIAS)
    problems = []
    if [entry["number"] for entry in history] != list(range(1, writers * each + 1)):
        problems.append(f"{len(history)} moves in the history, {writers * each} were acknowledged")
    if any(entry["previous"] != before for entry, before in zip(history, ["", *(entry["id"] for entry in history)], strict=False)):
        problems.append("a move did not start where the one before it had ended")
    if Counter(f"{entry['previous']} {entry['id']}" for entry in history) != Counter(moves):
        problems.append("the history is not what was acknowledged")
    return problems, sum(int(line.split()[1]) for line in said if line.startswith("tries")) - writers * each


def main(folder: Path, writers: int, each: int, seed: int) -> dict[str, Any]:
    """Both, in one registry."""
    root = folder / "registry"
    Registry(root)
    with light():
        published = publish_all(root, writers, each)
        moved, refused = move_all(root, writers, each, seed)
    return {"publish": published, "move": moved, "refused": refused}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))))
