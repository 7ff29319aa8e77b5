"""A soft prompt and what descends from it on two processes give what one process gives, under ZeRO-2."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from stages import soft
from stages.registry import Registry
from tests.launch.soft_worker import cases, work
from tests.stage.runs import ENVIRONMENT, ROOT, workspace

COMPARED = {"sft": "sft/loss", "dpo": "dpo/loss", "reward": "reward/loss", "ppo": "policy/approx_kl"}


def numbers(place: Path, case: str, label: str) -> list[float]:
    """One metric of each step."""
    lines = (Path(cases(place, label)[case][1]["output"]) / "metrics.jsonl").read_text().splitlines()
    found = [line[COMPARED[case]] for line in map(json.loads, lines) if COMPARED[case] in line]
    assert found, f"{case} logs no {COMPARED[case]}"
    return found


def test_two_processes_equal_one(tmp_path):
    place = workspace(tmp_path, rows=66)
    rows = [json.loads(line)["prompt"] for line in (place / "sft.jsonl").read_text().splitlines()]
    (place / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in rows[:20]))
    work(place, "one")
    machine = ["--config_file", str(ROOT / "configs/accelerate/cpu_zero2.yaml"), "--main_process_port", "0"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *machine, "-m", "tests.launch.soft_worker", str(place), "two"]
    ended = subprocess.run(command, env=ENVIRONMENT | {"TOKENIZERS_PARALLELISM": "false"}, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert ended.returncode == 0, ended.stderr[-5000:]
    registry = Registry(place / "registry")
    for case in COMPARED:
        assert numbers(place, case, "two") == pytest.approx(numbers(place, case, "one"), rel=1e-3, abs=1e-6), case
        assert soft.virtual_tokens(registry.resolve(f"{case}/two").model_dir) == 3, case
