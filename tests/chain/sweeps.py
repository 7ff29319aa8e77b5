"""A folder with a chain of fake stages, and sweeps of it in this process or one of their own."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from launch.sweep.run import run_sweep
from launch.sweep.setting import Setting, setting_of
from launch.sweep.space import from_text
from launch.sweep.subject import subject_of

CHAIN = """
name: tiny
base: {folder}/base
output: {folder}/out
prepare:
  prompts: {{run: "tests.chain.fakes:write_world", with: {{path: "${{output}}/data/prompts.jsonl", rows: 3}}, writes: ["${{output}}/data/prompts.jsonl"], before: ppo}}
sft: {{data: {folder}/demos.jsonl, train: {{learning_rate: 1e-2, eval_every: 10}}}}
reward: {{data: {folder}/pairs.jsonl, train: {{learning_rate: 1e-2, eval_every: 10}}}}
dpo: {{data: {folder}/pairs.jsonl, train: {{learning_rate: 1e-2, eval_every: 10}}}}
ppo: {{prompts: "${{output}}/data/prompts.jsonl"}}
"""
FAKE = (sys.executable, "-m", "tests.chain.fake_trial")
LR = "sft.train.learning_rate"


class Sweeps:
    """A chain file in a folder, and what is done with it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.file, self.out = folder, folder / "chain.yaml", folder / "out" / "sweep"
        (folder / "base").mkdir()
        (folder / "base" / "config.json").write_text("{}")
        (folder / "demos.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
        (folder / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
        self.file.write_text(CHAIN.format(folder=folder))

    def setting(self, *space: str, file: Path | None = None, **asked: Any) -> Setting:
        """A sweep of the chain with `--space` words and further options."""
        return setting_of(subject_of(str(file or self.file), asked.pop("overrides", [])), {"space": from_text(space) or None, **asked})

    def run(self, *space: str, retry_failed: bool = False, **asked: Any) -> int:
        """Run it in this process."""
        return run_sweep(self.setting(*space, **asked), again="align sweep", retry_failed=retry_failed, command=FAKE)

    def behave(self, **behaviour: Any) -> None:
        """How stages misbehave from now on."""
        (self.folder / "behaviour.json").write_text(json.dumps({key.replace("_", " "): value for key, value in behaviour.items()}))

    def calls(self) -> list[str]:
        """TRIAL:STEP:THREADS of every stage that was started since the last call."""
        file = self.folder / "calls.txt"
        names = file.read_text().split() if file.exists() else []
        file.unlink(missing_ok=True)
        return names

    def results(self) -> dict[str, Any]:
        """What results.json holds."""
        return json.loads((self.out / "results.json").read_text())

    def states(self) -> dict[int, str]:
        """Trial -> its state."""
        return {row["number"]: row["state"] for row in self.results()["trials"]}


if __name__ == "__main__":  # a sweep in a process of its own: FOLDER JSON-OF-OPTIONS SPACE…
    world = object.__new__(Sweeps)
    world.folder, world.file = Path(sys.argv[1]), Path(sys.argv[1]) / "chain.yaml"
    sys.exit(world.run(*sys.argv[3:], **json.loads(sys.argv[2])))
