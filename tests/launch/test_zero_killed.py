"""Stages of TRL's trainers under ZeRO-2 and 3, full and with adapters, killed and started again: they end as if nothing had happened, to the bit.

`make reliability` does this for every stage, layout and several deaths (tests/reliability/runs.py).
"""

from __future__ import annotations

import contextlib
import json
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import deepspeed  # noqa: F401 - imported before the forks, once
import pytest
import torch
import trl  # noqa: F401

from stages.registry import Registry
from stages.training import trainer_saves
from tests.launch.zero_mortal import run_in_processes, run_in_two
from tests.launch.zero_worker import LORA
from tests.stage.runs import settings, weights, workspace

TRAIN = {"max_steps": 6, "save_every": 3, "eval_every": 3, "log_every": 2, "micro_batch_size": 2}  # the save lies between two logs


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return workspace(tmp_path_factory.mktemp("killed"), rows=40)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("stage", "zero_stage", "lora"), [("sft", 3, LORA | {"dropout": 0.1}), ("reward", 2, None)])
def test_killed_and_run_again_ends_as_if_nothing_had_happened(place, capfd, monkeypatch, stage, zero_stage, lora):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    name = f"{stage}-{zero_stage}"
    whole, killed = (settings(place, stage, TRAIN, name=f"{name}-{label}", output=str(place / f"{name}-{label}"), lora=lora) for label in ("whole", "killed"))
    assert run_in_two(stage, whole, zero_stage) == [0, 0]
    assert -signal.SIGKILL in run_in_two(stage, killed, zero_stage, dies_at=5)
    save = Path(killed["output"]) / "resume" / "checkpoint-3"
    assert (save / "sealed.json").exists()
    assert not list(save.glob("*.safetensors")), "shards are enough to go on from"
    assert run_in_two(stage, killed, zero_stage) == [0, 0]
    assert "continuing from checkpoint-3" in capfd.readouterr().out
    lines = [[json.loads(line) for line in (Path(v["output"]) / "metrics.jsonl").read_text().splitlines()] for v in (whole, killed)]
    assert lines[0] == lines[1]
    assert len(lines[0]) == 3 + 2 + (stage == "sft")  # logs, evaluations, and in SFT what is known of the data
    first, second = (weights(Registry(place / "registry").resolve(f"{stage}/{name}-{label}")) for label in ("whole", "killed"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[n], second[n]) for n in first)


@pytest.mark.usefixtures("one_thread")
def test_a_save_is_not_continued_under_another_zero_stage_and_takes_the_settings_that_may_change(place, capfd, monkeypatch):
    """Its shards are laid out otherwise: DeepSpeed ended in a traceback. Weight decay and betas were allowed to change, recorded, and not used."""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    values = settings(place, "sft", TRAIN, name="moved", output=str(place / "moved"))
    assert -signal.SIGKILL in run_in_two("sft", values, 2, dies_at=4)
    assert run_in_two("sft", values | {"allow_changed": ["config", "processes"]}, 3) != [0, 0]
    assert "zero_stage: 2 → 3 (the machine file's" in capfd.readouterr().err
    assert (place / "moved" / "resume" / "checkpoint-3" / "sealed.json").exists()
    values["train"] = values["train"] | {"weight_decay": 0.25, "learning_rate": 2e-3}
    values["trainer"] = {"adam_beta1": 0.5}
    assert run_in_two("sft", values | {"allow_changed": ["config"]}, 2, around=partial(settings_used, place / "used")) == [0, 0]
    assert [json.loads(line) for line in (place / "used").read_text().splitlines()] == [[[0.25, 0.5, 2e-3 * 3 / 6], [0.0, 0.5, 2e-3 * 3 / 6]]] * 2


@contextlib.contextmanager
def settings_used(file: Path) -> Iterator[None]:
    """Each process writes the weight decay, the first beta and the learning rate of the optimizer's groups once it has resumed."""
    load = trainer_saves.as_configured

    def observed(trainer, groups):
        load(trainer, groups)
        with file.open("a") as stream:
            stream.write(json.dumps([[group["weight_decay"], group["betas"][0], group["lr"]] for group, _ in trainer_saves.settings_of(trainer)]) + "\n")

    trainer_saves.as_configured = observed
    yield


@pytest.mark.usefixtures("one_thread")
def test_another_number_of_processes_is_refused_and_where_allowed_takes_the_same_steps(place, capfd, monkeypatch):
    """Without dropout, so that what one process computes is what two do: the rows of every step, the optimizer and the half of a logging window are handed on."""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    whole, killed = (settings(place, "sft", TRAIN, name=f"world-{label}", output=str(place / f"world-{label}")) for label in ("whole", "killed"))
    assert run_in_processes("sft", whole, 2) == [0, 0]
    assert -signal.SIGKILL in run_in_processes("sft", killed, 2, death=("step", 6))
    assert run_in_processes("sft", killed, 1) != [0]
    assert "processes: 2 → 1\nChange it back to continue, allow it with --allow-changed processes" in capfd.readouterr().err
    assert run_in_processes("sft", killed | {"allow_changed": ["processes"]}, 1) == [0]
    said = capfd.readouterr().out
    assert "allowed to have changed: processes: 2 → 1" in said
    assert "continuing from checkpoint-3" in said
    first, second = ([json.loads(line) for line in (Path(v["output"]) / "metrics.jsonl").read_text().splitlines()] for v in (whole, killed))
    assert [line["step"] for line in second] == [line["step"] for line in first]
    for one, other in zip(first, second, strict=True):
        shown = [key for key in one if not key.endswith("accuracy")]  # TRL's is a mean of the means of micro-batches
        assert {key: other[key] for key in shown} == pytest.approx({key: one[key] for key in shown}, rel=1e-4)


@pytest.mark.usefixtures("one_thread")
def test_a_gradient_that_is_not_finite_stops_zero_3_with_the_saves_of_before(place, capfd, monkeypatch):
    """DeepSpeed calls such steps off itself before its optimizer is asked; they are counted all the same."""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    train = TRAIN | {"learning_rate": 1e25, "save_every": 1, "log_every": 1}
    values = settings(place, "sft", train, name="diverged", output=str(place / "diverged"))
    assert run_in_two("sft", values, 3) != [0, 0]
    assert "the gradient is not finite at step 6" in capfd.readouterr().err
    assert [save.name for save in (place / "diverged" / "resume").glob("checkpoint-*")] == ["checkpoint-1"]
    assert not Registry(place / "registry").list("sft", "diverged")
