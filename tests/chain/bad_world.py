"""A folder with everything a chain needs, a way to spoil one thing in it, and `align` commands run on it."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from launch.process import Outcome
from stages.registry import Checkpoint, Registry
from stages.registry.sealing import hash_file
from tests.tiny import tiny_model

TRAIN = {"max_steps": 1, "batch_size": 4, "micro_batch_size": 4}
SCORER = {"kind": "keyword", "words": ["please"]}
# What a command that fails may leave: the config it was given, logs, what a chain writes down, an empty registry.
LEFT = re.compile(r"(^|/)(config\.yaml|plan\.yaml|chain\.yaml|chain\.json|inputs\.json|identity\.json|metrics\.jsonl|logs/\w+\.log|registry\.json|prepare/\w+\.json)$")
MAINS = {"stages.sft": "stages.sft", "stages.reward": "stages.reward", "stages.dpo": "stages.dpo", "stages.ppo": "stages.ppo.train"}


class World:
    """base/, sft.jsonl, pairs.jsonl, prompts.jsonl, and registry/ with sft/tiny and reward/tiny."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    @property
    def registry(self) -> Registry:
        return Registry(self / "registry")

    @property
    def sft(self) -> Checkpoint:
        return self.registry.resolve("sft/tiny")

    @property
    def reward(self) -> Checkpoint:
        return self.registry.resolve("reward/tiny")

    def rows(self, name: str, rows: list[Any]) -> str:
        """Write JSON lines and return the path; a text stands for itself."""
        (self / name).write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return str(self / name)

    def config(self, stage: str, **changes: Any) -> str:
        """Write a stage's config, in which `changes` replace keys (None: leaves one out), and return its path."""
        file = self / f"{stage}.yaml"
        values = self.values(stage) | changes
        file.write_text(json.dumps({key: value for key, value in values.items() if value is not None}, indent=1))
        return str(file)

    def values(self, stage: str) -> dict[str, Any]:
        """A stage's config, in which nothing is wrong."""
        if stage == "chain":
            return {
                "name": "tiny", "base": str(self / "base"), "output": str(self / "out"), "max_length": 64, "split": {"validation": 0.1, "test": 0.2},
                "sft": {"data": str(self / "sft.jsonl"), "train": TRAIN},
            }  # fmt: skip
        shared = {
            "name": "tiny", "registry": str(self / "registry"), "output": str(self / "out"), "max_length": 64, "split": {"validation": 0.1, "test": 0.2},
            "init_from": str(self / "base") if stage == "sft" else "sft/tiny",
        }  # fmt: skip
        if stage == "ppo":
            train = {"iterations": 1, "rollout_batch_size": 4, "micro_batch_size": 4, "num_ppo_epochs": 1}
            return shared | {"prompts": str(self / "prompts.jsonl"), "scorers": [SCORER], "sampling": {"max_new_tokens": 4}, "train": train}
        if stage == "eval":
            chosen = {key: shared[key] for key in ("registry", "output", "split")}
            return chosen | {"checkpoints": {"sft": "sft/tiny"}, "prompts": str(self / "prompts.jsonl"), "scorers": [SCORER], "sampling": {"max_new_tokens": 4}}
        return shared | {"data": str(self / ("sft.jsonl" if stage == "sft" else "pairs.jsonl")), "train": TRAIN}

    def files(self) -> dict[str, str]:
        """Every file and its hash."""
        return {path.relative_to(self.folder).as_posix(): hash_file(path) for path in self.folder.rglob("*") if path.is_file()}

    def written_since(self, before: dict[str, str]) -> list[str]:
        """Files that a failed command must not have made, changed or removed."""
        after = self.files()
        touched = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
        staging = {path.relative_to(self.folder).as_posix() for path in self.folder.rglob(".*") if path.name != ".lock"}
        return sorted(staging | {name for name in touched if name in before or not LEFT.search(name)})


@dataclass(frozen=True)
class Case:
    """One kind of bad input: `arrange` spoils the world and returns the command; the message holds all of `says`."""

    name: str
    arrange: Callable[[World], list[str]]
    says: tuple[str, ...]


def make_world(folder: Path) -> World:
    """A sound world; the two checkpoints are trained for a step."""
    world = World(folder)
    tiny_model(folder / "base")
    prompts = [f"say {a} {b}" for a in "abcdef" for b in "mnopqr"]
    world.rows("sft.jsonl", [{"prompt": p, "completion": f"{p[4:]} please"} for p in prompts])
    world.rows("pairs.jsonl", [{"prompt": p, "chosen": f"{p[4:]} please", "rejected": f"{p[4:]} now"} for p in prompts])
    world.rows("prompts.jsonl", [{"prompt": p} for p in prompts])
    for stage in ("sft", "reward"):
        train(world, stage)
        shutil.rmtree(folder / "out")
    return world


def train(world: World, stage: str, **changes: Any) -> Checkpoint:
    """Run a stage in this process."""
    code = run_stage(f"stages.{stage}", ["--config", world.config(stage, **changes)])
    assert code == 0, f"{stage} does not run in a sound world"
    return world.registry.resolve(f"{stage}/{changes.get('name', 'tiny')}")


def run_stage(module: str, argv: list[str]) -> int:
    """What `python -m module argv` does, in this process; its exit code."""
    from stages.training.entry import run

    try:
        run(importlib.import_module(MAINS[module]).main, module.partition(".")[2], argv)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def run_child_here(argv: Any, env: Any, log_file: Path, **_: Any) -> Outcome:
    """Stands in for launch.process.run_child: the stage runs in this process, with the variables that it would have."""
    assert argv[1] == "-m"
    if argv[2] in MAINS:
        with patch.dict(os.environ, env):
            return Outcome(run_stage(argv[2], list(argv[3:])), 0.0)
    return Outcome(importlib.import_module(argv[2]).main(list(argv[3:])), 0.0)


def flip(file: Path) -> None:
    """Change one bit in the middle of a file, and nothing else: not the same file of another checkpoint, which may be a second name of it."""
    content = bytearray(file.read_bytes())
    content[len(content) * 2 // 3] ^= 0x10
    _put(file, content)


def truncate(file: Path) -> None:
    """Keep the first half of a file."""
    _put(file, file.read_bytes()[: file.stat().st_size // 2])


def _put(file: Path, content: bytes) -> None:
    file.with_name(".new").write_bytes(content)
    file.with_name(".new").replace(file)
