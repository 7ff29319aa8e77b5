"""Guards of SFT: every health check is provoked in a real run by what causes it, a healthy run provokes none; rehearsal; the learning-rate test."""

from __future__ import annotations

import json
import random
import subprocess
import sys

import pytest
import torch

from configs.errors import UserError
from stages.registry import Registry
from tests.stage.runs import ENVIRONMENT, ROOT, TRAIN, run, settings, weights, workspace, write_rows

GENERAL = "the cat sat on the mat and the dog ran to the door\n" * 12


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model that has learned to say please, and rows of another kind."""
    folder = workspace(tmp_path_factory.mktemp("guards"))
    (folder / "general.txt").write_text(GENERAL)
    prompts = [json.loads(line)["prompt"] for line in (folder / "sft.jsonl").read_text().splitlines()]
    write_rows(folder / "prompts.jsonl", [{"prompt": prompt} for prompt in prompts[:6]])
    write_rows(folder / "other.jsonl", [{"prompt": f"{prompt} again", "completion": f"{7 * i} {i}"} for i, prompt in enumerate(prompts)])
    run("sft", settings(folder, "sft", {"max_steps": 100, "learning_rate": 5e-3, "eval_every": 100}, name="polite", output=str(folder / "out-polite")))
    return folder


def lines_of(place, name):
    return [json.loads(line) for line in (place / f"out-{name}" / "metrics.jsonl").read_text().splitlines()]


def failed(place, name, train, **changes):
    """Run, and return the checks that failed, with their steps; the manifest counts the same."""
    checkpoint = run("sft", settings(place, "sft", train, name=name, output=str(place / f"out-{name}"), **changes))
    found: dict[str, list[int]] = {}
    for line in lines_of(place, name):
        for key in line:
            if key.startswith("health/"):
                found.setdefault(key.removeprefix("health/"), []).append(line["step"])
    assert checkpoint.info("stage_info")["health"] == {check: len(steps) for check, steps in found.items()}
    return found


def test_a_healthy_run_provokes_no_check(place, capsys):
    watched = {"plain_text": str(place / "general.txt"), "general_prompts": str(place / "prompts.jsonl"), "flat_steps": 20, "max_logprob_drop": 3.0}
    assert failed(place, "well", {"max_steps": 50, "eval_every": 10}, health=watched) == {}
    assert "warning" not in capsys.readouterr().out
    seen = [line for line in lines_of(place, "well") if "forgetting/perplexity" in line]
    assert [line["step"] for line in seen] == [0, 10, 20, 30, 40, 50]
    assert (seen[0]["forgetting/changed_answers"], seen[0]["forgetting/logprob_drop"]) == (0.0, 0.0)
    assert [line["step"] for line in lines_of(place, "well") if "sft/loss" in line] == list(range(1, 51)), "a look costs no training log"


def test_rows_that_are_learned_by_heart(place, capsys):
    draw = random.Random(1)
    rows = write_rows(place / "random.jsonl", [{"prompt": f"say {i}", "completion": "".join(draw.choices("abcdefgh", k=8))} for i in range(28)])
    train = {"max_steps": 80, "batch_size": 16, "micro_batch_size": 16, "learning_rate": 1e-2, "eval_every": 5, "log_every": 5, "schedule": "constant", "save_every": 80}
    assert failed(place, "heart", train, data=str(rows), split={"validation": 0.3, "test": 0.0}).keys() == {"overfitting"}
    said = capsys.readouterr().out
    assert "3 evaluations in a row above it" in said
    assert "Remedy: train fewer train.epochs" in said


def test_another_task_at_a_high_rate_forgets_the_first(place):
    train = {"max_steps": 30, "learning_rate": 5e-3, "eval_every": 10}
    watched = {"general_prompts": str(place / "prompts.jsonl")}
    found = failed(place, "forgets", train, init_from="sft/polite", data=str(place / "other.jsonl"), health=watched)
    assert found["forgetting"][0] == 10
    published = Registry(place / "registry").resolve("sft/forgets").info("stage_info")["forgetting"]
    assert published["logprob_drop"] > 1
    assert published["changed_answers"] > 0.5


def test_text_perplexity_is_that_of_the_evaluation(place):
    """Two ways to measure one thing: in training, in batches of the trainer, and on the published model."""
    from stages import models
    from stages.evaluation.likelihood import text_perplexity
    from stages.tokens import load_tokens

    checkpoint = run("sft", settings(place, "sft", {"max_steps": 3}, name="text", output=str(place / "out-text"), health={"plain_text": str(place / "general.txt")}))
    origin = models.find("sft/text", place / "registry")
    tokens, published = load_tokens(origin), checkpoint.info("stage_info")["forgetting"]
    assert published["perplexity"] == lines_of(place, "text")[-1].get("forgetting/perplexity", published["perplexity"])
    # The trainer's windows have at most max_length tokens; a file shorter than that is one window in both.
    (place / "short.txt").write_text(GENERAL[:100])
    short = run("sft", settings(place, "sft", {"max_steps": 3}, name="short", output=str(place / "out-short"), health={"plain_text": str(place / "short.txt")}))
    by_hand = text_perplexity(models.load_policy(models.find("sft/short", place / "registry")), tokens.tokenizer, place / "short.txt", pad_id=tokens.pad_id)
    assert short.info("stage_info")["forgetting"]["perplexity"] == pytest.approx(by_hand, rel=1e-5)


def test_validation_rows_that_stand_in_the_training_rows(place, capsys):
    rows = [json.loads(line) for line in (place / "sft.jsonl").read_text().splitlines()]
    twice = write_rows(place / "twice.jsonl", rows + [{**row, "prompt": row["prompt"] + "!"} for row in rows])
    found = failed(place, "twice", {"max_steps": 1}, data=str(twice))
    assert found == {"leakage_like_loss": [0]}
    assert "word for word" in capsys.readouterr().out


def test_a_model_that_has_seen_the_answers(place):
    """It was trained on them before: the first log is near 0."""
    one = write_rows(place / "one.jsonl", [{"prompt": f"say {i}", "completion": "plum please"} for i in range(60)])
    run("sft", settings(place, "sft", {"max_steps": 70, "learning_rate": 1e-2, "schedule": "constant", "eval_every": 70}, name="seen", output=str(place / "out-seen"), data=str(one)))
    assert failed(place, "again", {"max_steps": 2}, init_from="sft/seen", data=str(one)) == {"leakage_like_loss": [1]}


def test_a_rate_that_moves_nothing(place):
    found = failed(place, "flat", {"max_steps": 24, "learning_rate": 1e-9, "eval_every": 12}, health={"flat_steps": 20})
    assert found == {"flat_loss": [20, 21, 22, 23, 24]}


def test_a_rate_that_undoes_what_was_learned(place):
    found = failed(place, "high", {"max_steps": 40, "learning_rate": 0.3, "eval_every": 40}, init_from="sft/polite", health={"flat_steps": 20})
    assert "learning_rate_too_high" in found


def test_rows_that_are_too_long(place):
    assert "dropped_rows" in failed(place, "long", {"max_steps": 1}, max_length=58)


# -- what a failed check does; what a save holds


def test_stop_saves_and_ends_the_run_and_the_same_command_goes_on_to_the_bit(place, capsys):
    """With rehearsal and forgetting, whose state the save must hold: the starting model is gone when the run continues."""
    watched = {"plain_text": str(place / "general.txt"), "general_prompts": str(place / "prompts.jsonl"), "max_logprob_drop": 0.3}
    train = {"max_steps": 16, "learning_rate": 5e-3, "eval_every": 4, "save_every": 100, "log_every": 3, "rehearsal": {"data": str(place / "general.txt"), "tokens": 32}}
    values = settings(place, "sft", train, name="stop", output=str(place / "out-stop"), init_from="sft/polite", data=str(place / "other.jsonl"))
    with pytest.raises(UserError, match=r"health.action is stop(.|\n)*forgetting: answers that the starting model gave(.|\n)*The run is saved as it is"):
        run("sft", values | {"health": {**watched, "action": "stop"}})
    assert not Registry(place / "registry").list("sft", "stop")
    stopped = max(int(path.name.split("-")[1]) for path in (place / "out-stop" / "resume").glob("checkpoint-*"))
    assert stopped in (4, 8)
    capsys.readouterr()
    resumed = run("sft", values | {"health": {**watched, "action": "stop"}})
    assert f"continuing from checkpoint-{stopped}" in capsys.readouterr().out
    whole = run("sft", values | {"name": "whole", "output": str(place / "out-whole"), "health": watched})
    assert lines_of(place, "stop") == lines_of(place, "whole")
    assert all(torch.equal(tensor, weights(whole)[name]) for name, tensor in weights(resumed).items())


def test_stop_before_the_first_step_trains_nothing(place):
    values = settings(place, "sft", {"max_steps": 1}, name="early", output=str(place / "out-early"), max_length=58, health={"action": "stop"})
    with pytest.raises(UserError, match=r"dropped_rows: (.|\n)*Nothing was trained"):
        run("sft", values)


# -- rehearsal


def mixed(place, name, train=None, **changes):
    rehearsal = {"data": [str(place / "general.txt"), str(place / "other.jsonl")], "share": 0.25, "tokens": 24, "weight": 0.5}
    run("sft", settings(place, "sft", {"max_steps": 4, "rehearsal": rehearsal} | (train or {}), name=name, output=str(place / f"out-{name}"), **changes))
    return [line for line in lines_of(place, name) if "sft/loss" in line]


def test_cutting_the_batch_differently_changes_nothing_and_the_loss_is_both_means(place):
    cuts = [mixed(place, f"mix{size}", {"micro_batch_size": size}) for size in (8, 2)]
    for line, other in zip(*cuts, strict=True):
        assert line["sft/objective"] == pytest.approx(line["sft/loss"] + 0.5 * line["sft/rehearsal_loss"], rel=1e-5)
        for key in ("sft/objective", "sft/loss", "sft/rehearsal_loss", "sft/token_accuracy", "sft/entropy"):
            assert other[key] == pytest.approx(line[key], rel=1e-5)
    data = Registry(place / "registry").resolve("sft/mix8").info("data")
    assert data["rehearsal"]["fingerprint"] == data["parts"]["rehearsal"]


def test_the_first_task_loss_is_that_of_the_same_rows_alone(place, capsys):
    """6 of 8 rows per step are the task's: a run without rehearsal and a batch of 6 begins with the same rows. It is what the line shows as the loss."""
    alone = settings(place, "sft", {"max_steps": 1, "batch_size": 6, "micro_batch_size": 2}, name="alone", output=str(place / "out-alone"))
    run("sft", alone)
    first = next(line for line in lines_of(place, "alone") if "sft/loss" in line)
    capsys.readouterr()
    for chunk in ("auto", None):
        line = mixed(place, f"mixed-{chunk}".lower(), {"max_steps": 1, "micro_batch_size": 4, "loss_chunk": chunk})[0]
        for key in ("sft/loss", "sft/token_accuracy", "sft/entropy"):
            assert line[key] == pytest.approx(first[key], rel=1e-5), "the task's, whatever the general text is like"
        assert f"sft 1/1  loss {first['sft/loss']:.4g}  rehearsal_loss {line['sft/rehearsal_loss']:.4g}  lr" in capsys.readouterr().out


def test_packed_rows_and_adapters_rehearse_too(place):
    packed = mixed(place, "packed", {"batch_size": 4, "micro_batch_size": 2, "max_steps": 2}, packing=True, lora={"rank": 2})
    assert all(line["sft/objective"] == pytest.approx(line["sft/loss"] + 0.5 * line["sft/rehearsal_loss"], rel=1e-5) for line in packed)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": {"label_smoothing": 0.1, "loss_chunk": None}}, "train.rehearsal with train.label_smoothing needs the loss in chunks"),
        ({"health": {"plain_text": "no-such.txt"}}, "plain_text no-such.txt: cannot be read"),
    ],
)
def test_refusals(place, changes, message):
    with pytest.raises(UserError, match=message):
        mixed(place, "refused", changes.get("train"), **{key: value for key, value in changes.items() if key != "train"})


# -- the learning-rate test


def test_find_lr_suggests_a_rate_and_publishes_nothing(place):
    file = place / "find.json"
    file.write_text(json.dumps(settings(place, "sft", TRAIN, name="find", output=str(place / "out-find"))))
    command = [sys.executable, "-m", "launch.cli", "sft", "--config", str(file), "--find-lr", "--lr-range", "1e-5:10:60", "--json"]
    done = subprocess.run(command, env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["rates"][0] == pytest.approx(1e-5)
    assert found["suggestion"] == pytest.approx(found["at_lowest"] / 10)
    assert 1e-5 < found["suggestion"] < 1
    assert sorted(path.name for path in (place / "out-find" / "find-lr").iterdir() if path.is_file()) == ["config.yaml", "learning_rate.json", "learning_rate.png"]
    assert not list((place / "out-find").rglob("checkpoint-*"))
    assert not Registry(place / "registry").list("sft", "find")
