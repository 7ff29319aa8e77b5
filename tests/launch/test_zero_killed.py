"""SFT and DPO under ZeRO-2 and 3, full and with adapters, killed and started again: they end as if nothing had happened, to the bit."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import deepspeed  # noqa: F401 - imported before the forks, once
import pytest
import torch
import trl  # noqa: F401

from stages.registry import Registry
from tests.launch.zero_mortal import run_in_two
from tests.launch.zero_worker import LORA
from tests.stage.runs import settings, weights, workspace

TRAIN = {"max_steps": 6, "save_every": 2, "eval_every": 3, "micro_batch_size": 2}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return workspace(tmp_path_factory.mktemp("killed"), rows=40)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("stage", "zero_stage", "lora"), [("sft", 2, None), ("sft", 3, LORA), ("dpo", 2, LORA), ("dpo", 3, None)])
def test_killed_and_run_again_ends_as_if_nothing_had_happened(place, capfd, monkeypatch, stage, zero_stage, lora):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    name = f"{stage}-{zero_stage}"
    whole, killed = (settings(place, stage, TRAIN, name=f"{name}-{label}", output=str(place / f"{name}-{label}"), lora=lora) for label in ("whole", "killed"))
    assert run_in_two(stage, whole, zero_stage) == [0, 0]
    assert -signal.SIGKILL in run_in_two(stage, killed, zero_stage, dies_at=4)
    save = Path(killed["output"]) / "resume" / "checkpoint-2"
    assert (save / "sealed.json").exists()
    assert not list(save.glob("*.safetensors")), "shards are enough to go on from"
    assert run_in_two(stage, killed, zero_stage) == [0, 0]
    assert "continuing from checkpoint-2" in capfd.readouterr().out
    lines = [[json.loads(line) for line in (Path(v["output"]) / "metrics.jsonl").read_text().splitlines()] for v in (whole, killed)]
    assert lines[0] == lines[1]
    assert len(lines[0]) == 6 + 2
    first, second = (weights(Registry(place / "registry").resolve(f"{stage}/{name}-{label}")) for label in ("whole", "killed"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[n], second[n]) for n in first)


@pytest.mark.usefixtures("one_thread")
def test_a_save_is_not_continued_under_another_zero_stage(place, capfd, monkeypatch):
    """Its shards are laid out otherwise: DeepSpeed ended in a traceback."""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    values = settings(place, "sft", TRAIN, name="moved", output=str(place / "moved"))
    assert -signal.SIGKILL in run_in_two("sft", values, 2, dies_at=4)
    assert run_in_two("sft", values, 3) != [0, 0]
    assert "zero_stage: 2 → 3 (the machine file's" in capfd.readouterr().err
    assert (place / "moved" / "resume" / "checkpoint-2" / "sealed.json").exists()


@pytest.mark.usefixtures("one_thread")
def test_a_gradient_that_is_not_finite_stops_zero_3_with_the_saves_of_before(place, capfd, monkeypatch):
    """DeepSpeed calls such steps off itself before its optimizer is asked; they are counted all the same."""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    train = TRAIN | {"learning_rate": 1e25, "save_every": 1}
    values = settings(place, "sft", train, name="diverged", output=str(place / "diverged"))
    assert run_in_two("sft", values, 3) != [0, 0]
    assert "the gradient is not finite at step 6" in capfd.readouterr().err
    assert [save.name for save in (place / "diverged" / "resume").glob("checkpoint-*")] == ["checkpoint-1"]
    assert not Registry(place / "registry").list("sft", "diverged")
