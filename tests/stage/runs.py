"""What the tests of the supervised stages share: a tiny base, a few rows, configs, and runs of a stage."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from stages.registry import Checkpoint, Registry
from tests.tiny import tiny_model

ROOT = Path(__file__).resolve().parents[2]
WORDS = ["apple", "pear", "plum", "fig", "lime", "kiwi", "date", "nut"]
TRAIN = {"batch_size": 8, "micro_batch_size": 4, "learning_rate": 1e-3, "log_every": 1, "eval_every": 3, "warmup": 0.0}
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT),
}  # fmt: skip


def workspace(folder: Path, rows: int = 60, **config: Any) -> Path:
    """A folder with base/, sft.jsonl and pairs.jsonl: prompts of different lengths, answers of different lengths. `config` goes to the base's."""
    tiny_model(folder / "base", **config)
    draw = random.Random(0)
    demonstrations, pairs = [], []
    for index in range(rows):
        prompt = f"say {' '.join(draw.choices(WORDS, k=draw.randrange(1, 5)))} {index}"
        demonstrations.append({"prompt": prompt, "completion": draw.choice(WORDS) + " please" * draw.randrange(1, 4)})
        pairs.append({"prompt": prompt, "chosen": "yes " + draw.choice(WORDS), "rejected": "no " + " ".join(draw.choices(WORDS, k=2))})
    write_rows(folder / "sft.jsonl", demonstrations)
    write_rows(folder / "pairs.jsonl", pairs)
    return folder


def write_rows(file: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows as JSON lines."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def settings(folder: Path, stage: str, train: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """A stage's config as a mapping; `train` and `changes` replace defaults."""
    values = {
        "name": "tiny", "registry": str(folder / "registry"), "output": str(folder / f"out-{stage}"), "init_from": str(folder / "base"),
        "data": str(folder / ("sft.jsonl" if stage == "sft" else "pairs.jsonl")), "max_length": 128, "train": TRAIN | (train or {}),
        "split": {"validation": 0.1, "test": 0.1},
    }  # fmt: skip
    return values | changes


def run(stage: str, values: dict[str, Any]) -> Checkpoint:
    """Run a stage in this process and return what it published."""
    import importlib

    from configs import schema

    cfg = getattr(schema, {"sft": "SFTStage", "reward": "RewardStage", "dpo": "DPOStage"}[stage]).model_validate(values)
    importlib.import_module(f"stages.{stage}").main(cfg)
    return Registry(values["registry"]).resolve(f"{stage}/{values['name']}")


class Interrupted(Exception):
    """Stands for a crash."""


def run_until(stage: str, values: dict[str, Any], step: int) -> None:
    """Run a stage that crashes once it has taken `step` optimizer steps and has the gradient of the next."""
    from stages.training import guarding

    def crash(self: Any, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == step:
            raise Interrupted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(guarding.SkipSteps, "on_pre_optimizer_step", crash)
        with pytest.raises(Interrupted):
            run(stage, values)


def command(stage: str, values: dict[str, Any], file: Path, processes: int = 1) -> list[str]:
    """The command that runs a stage in a process of its own, or in several under accelerate launch."""
    file.write_text(json.dumps(values))
    if processes == 1:
        return [sys.executable, "-m", f"stages.{stage}", "--config", str(file)]
    # The machine file, because `--cpu --num_processes 2` on its own starts one process.
    machine = ["--config_file", str(ROOT / "configs/accelerate/cpu_ddp.yaml"), "--num_processes", str(processes), "--main_process_port", "0"]
    return [sys.executable, "-m", "accelerate.commands.launch", *machine, "-m", f"stages.{stage}", "--config", str(file)]


def run_apart(stage: str, values: dict[str, Any], file: Path, processes: int = 1) -> subprocess.CompletedProcess[str]:
    """Run a stage in processes of its own."""
    return subprocess.run(command(stage, values, file, processes), env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, timeout=300)


def metrics(folder: Path, stage: str, key: str) -> list[float]:
    """One metric of OUTPUT/metrics.jsonl, in order."""
    rows = [json.loads(line) for line in (folder / f"out-{stage}" / "metrics.jsonl").read_text().splitlines()]
    return [row[f"{stage}/{key}"] for row in rows if f"{stage}/{key}" in row]


def weights(checkpoint: Checkpoint) -> dict[str, Any]:
    """The published tensors."""
    from safetensors.torch import load_file

    return load_file(next(checkpoint.model_dir.glob("*.safetensors")))
