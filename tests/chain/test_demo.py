"""`align demo --smoke`: every step of the demo's chain in a small size, and the summary that it leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
FIGURES = {"gold", "gold_se", "win_rate_vs_sft", "win_rate_ci", "kl", "length"}


def test_the_smoke_demo_runs_from_nothing_and_leaves_its_summary(tmp_path):
    output = tmp_path / "demo"
    command = [sys.executable, "-m", "launch.cli", "demo", "--smoke", "--output", str(output)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]

    summary = json.loads((output / "summary.json").read_text())
    assert set(summary) == {"seconds", "models", "reward"}
    assert set(summary["models"]) == {"base", "sft", "dpo", "ppo"}
    assert all(set(figures) == FIGURES for figures in summary["models"].values())
    assert set(summary["reward"]) == {"accuracy", "best_shortcut", "ece"}
    models = summary["models"]
    assert models["sft"]["win_rate_vs_sft"] == 0.5
    assert models["sft"]["kl"] == 0
    assert all(0 <= figures["gold"] <= 1 for figures in models.values())
    assert models["ppo"]["kl"] > 0
    assert models["dpo"]["kl"] > 0

    again = subprocess.run([*command, "--json"], cwd=ROOT, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr[-2000:]
    report = json.loads(again.stdout)
    assert [step["action"] for step in report["steps"]] == ["skip"] * 7, "a repeated demo did not skip what is done"
    assert report["summary"]["models"] == models
    for stage in ("sft", "reward", "dpo", "ppo"):
        assert len(list((output / "registry" / "versions" / stage / "demo").glob("*.json"))) == 1
