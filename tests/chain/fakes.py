"""A chain of fake stages in a folder: its YAML, the commands that replace the stages, and what ran."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from launch.chain.runner import run_chain, step_command
from launch.chain.steps import Step
from launch.command import Command

CHAIN = """
name: tiny
base: {folder}/base
output: {folder}/out
prepare:
  world: {{run: "tests.chain.fakes:write_world", with: {{path: {folder}/prompts.jsonl, rows: 3}}, writes: [{folder}/prompts.jsonl]}}
sft: {{data: {folder}/demos.jsonl}}
reward: {{data: {folder}/pairs.jsonl}}
dpo: {{data: {folder}/pairs.jsonl}}
ppo: {{prompts: {folder}/prompts.jsonl}}
eval: {{prompts: {folder}/prompts.jsonl, scorers: [{{kind: keyword, words: [please]}}]}}
"""


def write_world(path: str, rows: int) -> None:
    """A prepare function."""
    Path(path).write_text("".join(json.dumps({"prompt": f"prompt {n}"}) + "\n" for n in range(rows)))


def fake_command(step: Step, file: Path, chain: Any) -> Command:
    """The real command for prepare steps, the fake stage for the others."""
    if step.kind == "prepare":
        return step_command(step, file, chain)
    script = Path(__file__).with_name("fake_stage.py")
    root = str(Path(__file__).resolve().parents[2])
    return Command((sys.executable, str(script), step.kind, step.name, str(file)), f"fake {step.name}", {"PYTHONPATH": root})


class World:
    """A folder with a chain in it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.file, self.out = folder, folder / "chain.yaml", folder / "out"
        (folder / "base").mkdir()
        (folder / "base" / "config.json").write_text("{}")
        (folder / "demos.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
        (folder / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
        self.file.write_text(CHAIN.format(folder=folder))

    def run(self, *overrides: str, **options: Any) -> int:
        """`align run` with fake stages."""
        return run_chain(str(self.file), list(overrides), command_for=fake_command, **options)

    def behave(self, **behaviour: str) -> None:
        """How stages misbehave from now on."""
        (self.folder / "behaviour.json").write_text(json.dumps(behaviour))

    def calls(self) -> list[str]:
        """The stages that have been started since the last call."""
        file = self.folder / "calls.txt"
        names = file.read_text().split() if file.exists() else []
        file.unlink(missing_ok=True)
        return names

    def init_from(self, ref: str) -> str:
        """What a published checkpoint was started from."""
        from stages.registry import Registry

        made = json.loads((Registry(self.out / "registry").resolve(ref).model_dir / "config.json").read_text())
        return made["init_from"]


if __name__ == "__main__":  # `align run` in a process of its own
    sys.exit(run_chain(sys.argv[1], sys.argv[2:], command_for=fake_command))
