"""A chain of the real stages on a tiny model, killed in the middle and run again."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.cli import main
from stages.registry import Registry
from stages.registry.exporting import export
from tests.security import canaries
from tests.tiny import tiny_data, tiny_model

CHAIN = """
name: tiny
base: {folder}/base
output: {folder}/out
max_length: 64
template: plain
split: {{validation: 0.1, test: 0.2}}
sft: {{data: {folder}/demos.jsonl, train: {{epochs: 2, batch_size: 16, micro_batch_size: 8, learning_rate: 1e-3}}, trainer: {{report_to: tensorboard}}}}
reward: {{data: {folder}/pairs.jsonl, train: {{epochs: 60, batch_size: 16, micro_batch_size: 8, learning_rate: 1e-4, save_every: 5}}}}
dpo: {{data: {folder}/pairs.jsonl, train: {{epochs: 1, batch_size: 16, micro_batch_size: 8, learning_rate: 1e-3}}}}
ppo:
  prompts: {folder}/prompts.jsonl
  sampling: {{max_new_tokens: 8}}
  train: {{iterations: 2, rollout_batch_size: 16, micro_batch_size: 8, num_ppo_epochs: 1}}
eval: {{prompts: {folder}/prompts.jsonl, sampling: {{max_new_tokens: 8}}, scorers: [{{kind: keyword, words: [please]}}]}}
"""


@pytest.fixture(scope="module")
def chain(tmp_path_factory) -> Path:
    """The chain file, with its model and data beside it."""
    folder = tmp_path_factory.mktemp("chain")
    tiny_model(folder / "base")
    tiny_data(folder, "mnopqrst")
    canaries.plant(folder, "demos.jsonl", "pairs.jsonl", "prompts.jsonl")
    file = folder / "chain.yaml"
    file.write_text(CHAIN.format(folder=folder))
    return file


def _wait_for_a_save(folder: Path, run: subprocess.Popen) -> None:
    """Until the stage has a sealed save, so that there is something to continue from."""
    until = time.monotonic() + 180
    while not list(folder.glob("resume/checkpoint-*/sealed.json")):
        assert run.poll() is None, "the run ended before it was to be killed"
        assert time.monotonic() < until, "no save within three minutes"
        time.sleep(0.05)


def test_killed_in_the_reward_stage_then_run_again(chain, capfd, monkeypatch):
    for name, token in canaries.TOKENS.items():
        monkeypatch.setenv(name, token)
    out = chain.parent / "out"
    run = subprocess.Popen([sys.executable, "-m", "launch.cli", "run", str(chain)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_for_a_save(out / "reward", run)
    finally:
        os.kill(run.pid, signal.SIGKILL)
        run.wait()
    assert [c.ref for c in Registry(out / "registry").list()] == ["sft/tiny@1"]  # nothing half-published
    assert canaries.found(out)[1] == []  # in the saves of a stage that is not done, too

    assert main(["run", str(chain), "--dry-run"]) == 0
    said = capfd.readouterr().out
    assert "[1/5] sft: skip (sft/tiny@1 is published and its inputs are unchanged)" in said
    assert "[2/5] reward: continue (was interrupted)" in said

    assert main(["run", str(chain)]) == 0
    said = capfd.readouterr().out
    assert "[reward] resume: continuing from checkpoint-" in said
    assert "perplexity" in said or "KL" in said  # the table
    export(Registry(out / "registry"), "ppo/tiny", out / "export")  # with its model card
    files, leaks = canaries.found(out, printed=said)
    assert leaks == []
    assert files > 50
    (events,) = (out / "sft" / "tensorboard").glob("events.out.tfevents.*")  # among what was searched
    assert b"train/" in events.read_bytes()
    registry = Registry(out / "registry")
    assert [c.ref for c in registry.list()] == ["dpo/tiny@1", "ppo/tiny@1", "reward/tiny@1", "sft/tiny@1"]
    assert all(registry.verify(c.ref, deep=True) == [] for c in registry.list())
    summary = json.loads((out / "summary.json").read_text())
    assert list(summary["models"]) == ["base", "sft", "dpo", "ppo"]
    assert summary["models"]["sft"]["kl"] == pytest.approx(0, abs=1e-6)
    assert all(isinstance(summary["reward"][name], float) for name in ("accuracy", "best_shortcut", "ece"))

    assert main(["run", str(chain)]) == 0
    assert capfd.readouterr().out.count(": skip (") == 5


def test_a_stage_under_two_processes_tells_a_user_error_once(chain, capfd):
    """The real launcher: its agent's report does not bury the error, and its exit code 1 becomes the stage's 2."""
    config = chain.parent / "sft.yaml"
    config.write_text(
        f"name: odd\nregistry: {chain.parent}/odd\noutput: {chain.parent}/odd-out\ninit_from: {chain.parent}/base\ntemplate: plain\nmax_length: 64\n"
        f"data: {chain.parent}/demos.jsonl\ntrain: {{batch_size: 16000, micro_batch_size: 8}}\n"
    )
    assert main(["sft", "--config", str(config), "--machine", "cpu_ddp"]) == 2
    err = capfd.readouterr().err
    assert re.match(r"error: there are \d+ training rows, fewer than one batch \(train\.batch_size 16000\)", err)
    assert "Traceback" not in err
    assert err.count("error:") == 1
    assert not (chain.parent / "odd" / "checkpoints").exists() or not any((chain.parent / "odd" / "checkpoints").iterdir())
