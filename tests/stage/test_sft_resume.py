"""Interrupted runs: killed at any time and started again, they end as if nothing had happened, or say why they can't."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from configs.errors import UserError
from stages.registry import Registry
from tests.stage.runs import (
    ENVIRONMENT,
    ROOT,
    Interrupted,
    command,
    metrics,
    run,
    run_apart,
    run_until,
    settings,
    weights,
    workspace,
)

LONG = {"max_steps": 60, "save_every": 5, "eval_every": 10, "log_every": 5}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return workspace(tmp_path_factory.mktemp("resume"))


def kill_after_save(arguments: list[str], resume, step: int) -> None:
    """Start a run and SIGKILL it once the save of `step` is sealed, in the middle of the steps after it."""
    process = subprocess.Popen(arguments, env=ENVIRONMENT, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (resume / f"checkpoint-{step}" / "sealed.json").exists():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo"])
def test_killed_and_run_again_ends_as_if_nothing_had_happened(place, stage):
    """Weights and metrics equal those of an uninterrupted run, bit for bit."""
    whole = settings(place, stage, LONG, name="whole", output=str(place / f"out-{stage}"))
    assert run_apart(stage, whole, place / "whole.json").returncode == 0
    expected = {key: metrics(place, stage, key) for key in ("loss", "eval_loss")}

    broken = settings(place, stage, LONG, name="broken", output=str(place / f"out-{stage}"))
    kill_after_save(command(stage, broken, place / "broken.json"), place / f"out-{stage}" / "resume", 15)
    assert not Registry(place / "registry").list(stage, "broken")
    again = run_apart(stage, broken, place / "broken.json")
    assert again.returncode == 0, again.stderr
    assert "continuing from checkpoint-" in again.stdout

    registry = Registry(place / "registry")
    first, second = (weights(registry.resolve(f"{stage}/{name}")) for name in ("whole", "broken"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert {key: metrics(place, stage, key) for key in expected} == expected
    assert not registry.verify(f"{stage}/broken", deep=True)


@pytest.fixture
def interrupted(place, request):
    """A run that crashed at step 8, with saves at 3 and 6; returns its config."""
    name = request.node.name.split("[")[0].replace("_", "-")[-60:].strip("-")
    values = settings(place, "sft", {"max_steps": 10, "save_every": 3, "eval_every": 5}, name=name, output=str(place / name))
    run_until("sft", values, 8)
    return values


def save(values, step: int):
    return Path(values["output"]) / "resume" / f"checkpoint-{step}"


def test_a_save_that_was_not_finished_is_passed_over(interrupted, capsys):
    (save(interrupted, 6) / "sealed.json").unlink()
    (save(interrupted, 6) / "optimizer.pt").write_bytes(b"half")
    run("sft", interrupted)
    said = capsys.readouterr().out
    assert "checkpoint-6 is ignored and put aside as damaged-checkpoint-6: it was not finished" in said
    assert "continuing from checkpoint-3" in said


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt", "trainer_state.json"])
def test_one_flipped_byte_is_noticed(interrupted, capsys, file):
    path = save(interrupted, 6) / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    run("sft", interrupted)
    said = capsys.readouterr().out
    assert f"{file} is damaged" in said
    assert "continuing from checkpoint-3" in said


def test_without_a_sound_save_it_starts_anew(interrupted, capsys):
    for step in (3, 6):
        (save(interrupted, step) / "sealed.json").unlink()
    run("sft", interrupted)
    assert "continuing" not in capsys.readouterr().out


CHANGED = {  # what changes: the line of the diff, and the keys that allow it
    "schedule": ("train.learning_rate: 0.001 → 0.002", ["train.learning_rate", "config", "train", "schedule"]),
    "config": ("train.weight_decay: 0.0 → 0.1", ["train.weight_decay", "config"]),
    "data": ("data.train: ", ["data"]),
    "tokenizer": ("tokenizer: .* → 'another'", ["tokenizer"]),
    "processes": ("processes: 1 → 2", ["processes"]),
}


@pytest.mark.parametrize("what", CHANGED)
def test_changed_inputs_are_refused_with_a_diff_unless_allowed(interrupted, monkeypatch, what, tmp_path):
    values = dict(interrupted)
    if what in ("schedule", "config"):
        values["train"] = values["train"] | ({"learning_rate": 2e-3} if what == "schedule" else {"weight_decay": 0.1})
    elif what == "data":
        lines = Path(values["data"]).read_text().splitlines()
        Path(values["data"]).rename(tmp_path / "kept.jsonl")
        Path(values["data"]).write_text("\n".join([*lines[1:], json.dumps({"prompt": "another", "completion": "row"})]) + "\n")
    elif what == "tokenizer":
        from stages import tokens

        monkeypatch.setattr(tokens, "tokenizer_digest", lambda tokenizer: "another")
    else:
        from stages.training import changes

        monkeypatch.setattr(changes, "world_size", lambda: 2)
    line, keys = CHANGED[what]
    seals = {step: (save(values, step) / "sealed.json").read_bytes() for step in (3, 6)}
    try:
        with pytest.raises(UserError, match=rf"checkpoint-6 was made otherwise \(field: was → is\):\n  {line}[^\n]*\nChange it back .*--allow-changed {keys[0]}"):
            run("sft", values)
        for key in CHANGED.keys() - {what, "config"}:
            with pytest.raises(UserError, match="was made otherwise"):
                run("sft", values | {"allow_changed": [key]})
        assert {step: (save(values, step) / "sealed.json").read_bytes() for step in (3, 6)} == seals, "a refusal changes nothing"
        run("sft", values | {"allow_changed": keys[-1:]})
    finally:
        if what == "data":
            (tmp_path / "kept.jsonl").replace(values["data"])


def test_what_was_allowed_to_change_is_used(interrupted, place, monkeypatch):
    """The optimizer's and the schedule's saved state hold the old values: steps after the save take the new ones all the same."""
    from stages.training import trainer_saves

    seen = []
    whole = trainer_saves.as_configured
    monkeypatch.setattr(trainer_saves, "as_configured", lambda trainer, groups: (whole(trainer, groups), seen.extend(trainer_saves.settings_of(trainer))))
    changed = {"learning_rate": 2e-3, "weight_decay": 0.25, "max_steps": 12}
    run("sft", interrupted | {"train": interrupted["train"] | changed, "allow_changed": ["config"]})
    rows = [json.loads(line) for line in (Path(interrupted["output"]) / "metrics.jsonl").read_text().splitlines()]
    rates = {row["step"]: row["learning_rate"] for row in rows if "learning_rate" in row}
    assert [rates[step] for step in (6, 7, 8, 12)] == pytest.approx([1e-3 * 5 / 10, 2e-3 * 6 / 12, 2e-3 * 5 / 12, 2e-3 * 1 / 12])
    assert [group["weight_decay"] for group, _ in seen] == [0.25, 0.0]
    assert [group["lr"] for group, _ in seen] == pytest.approx([2e-3 * 6 / 12] * 2)


def test_killed_after_the_last_step_it_only_publishes(place, monkeypatch, capsys):
    from stages.training import publish

    values = settings(place, "sft", {"max_steps": 4}, name="late", output=str(place / "late"))
    with monkeypatch.context() as patch:
        patch.setattr(publish, "publish_checkpoint", lambda *a, **k: (_ for _ in ()).throw(Interrupted))
        with pytest.raises(Interrupted):
            run("sft", values)
    lines = (place / "late" / "metrics.jsonl").read_text()
    checkpoint = run("sft", values)
    assert "continuing from checkpoint-4" in capsys.readouterr().out
    assert (place / "late" / "metrics.jsonl").read_text() == lines
    whole = run("sft", values | {"name": "late-whole", "output": str(place / "late-whole")})
    assert all(torch.equal(tensor, weights(whole)[name]) for name, tensor in weights(checkpoint).items())


def test_a_run_that_stopped_early_and_was_killed_does_not_train_on(place, monkeypatch):
    from stages.training import publish

    train = {"learning_rate": 0.5, "eval_every": 1, "max_steps": 20, "early_stopping_patience": 2}
    values = settings(place, "sft", train, name="early", output=str(place / "early"))
    with monkeypatch.context() as patch:
        patch.setattr(publish, "publish_checkpoint", lambda *a, **k: (_ for _ in ()).throw(Interrupted))
        with pytest.raises(Interrupted):
            run("sft", values)
    lines = (place / "early" / "metrics.jsonl").read_text()
    checkpoint = run("sft", values)
    assert (place / "early" / "metrics.jsonl").read_text() == lines
    best = min(json.loads(line)["sft/eval_loss"] for line in lines.splitlines() if "sft/eval_loss" in line)
    assert checkpoint.info("metrics")["loss"] == pytest.approx(best, rel=1e-5)


def test_the_inputs_key_is_recorded(place, monkeypatch):
    monkeypatch.setenv("ALIGN_INPUTS_KEY", "abc")
    assert run("sft", settings(place, "sft", {"max_steps": 1}, name="key")).info("inputs_key") == "abc"


def test_a_run_that_stopped_early_publishes_its_best_state_and_keeps_its_last_to_go_on_from(tmp_path, capsys):
    """Patience 1, and no evaluation improves by 100 nats: stopped at step 2. Written out again, with patience 3 it is the run that had it from the beginning."""
    from stages.registry import resumable

    def early(patience, **changes):
        evaluation = {"early_stopping": {"patience": patience, "min_improvement": 100.0}}
        return settings(workspace(tmp_path) if not (tmp_path / "base").exists() else tmp_path, "sft", {"max_steps": 9, "eval_every": 1, "schedule": "constant"}, evaluation=evaluation, **changes)

    first = run("sft", early(1, name="early"))
    registry = Registry(tmp_path / "registry")
    assert "kept checkpoint-2" in capsys.readouterr().out
    resumable.restore(registry, first.ref, tmp_path / "again")
    found = run("sft", early(3, name="early", output=str(tmp_path / "again"), allow_changed=["evaluation"]))
    assert "continuing from checkpoint-2" in capsys.readouterr().out
    whole = run("sft", early(3, name="whole", output=str(tmp_path / "whole"), keep_resume=False))
    assert all(torch.equal(tensor, weights(whole)[name]) for name, tensor in weights(found).items())
    assert not all(torch.equal(tensor, weights(first)[name]) for name, tensor in weights(found).items())
    assert [item.ref for item in resumable.kept(registry)] == ["sft/early@1", "sft/early@2"], "not where keep_resume is false"
    plain = run("sft", settings(tmp_path, "sft", {"max_steps": 1}, name="plain"))
    assert plain.ref not in [item.ref for item in resumable.kept(registry)], "nor where the last state is the published one"
