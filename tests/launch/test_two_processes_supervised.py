"""Two processes under accelerate launch give what one gives: losses, evaluations, published weights and metrics."""

from __future__ import annotations

import json
import signal
import subprocess
import time

import pytest
import torch

from stages.registry import Registry
from tests.launch.zero_worker import WRITTEN
from tests.stage.runs import ENVIRONMENT, ROOT, command, metrics, run_apart, settings, weights, workspace, write_rows

TOLERANCE = 1e-4  # relative, fp32
THAW = {"tune": {"method": "full", "freeze": {"first": 2, "embeddings": True, "unfreeze_every": 4}}}  # DDP is to find which gradients there are in each step
TRAIN = {"max_steps": 12, "micro_batch_size": 2, "learning_rate": 3e-3}


FORGETTING = ("forgetting/perplexity", "forgetting/logprob_drop", "forgetting/changed_answers")
EVALUATED = {"metrics": ["chrf", WRITTEN, "accuracy"], "generate": {"rows": 5, "max_new_tokens": 10, "batch_size": 2}}  # five rows of two processes
FOUND = ("evaluation/chrf", "evaluation/written", "evaluation/accuracy", "evaluation/macro_f1", "evaluation/perplexity")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = workspace(tmp_path_factory.mktemp("two"), rows=66)
    (folder / "general.txt").write_text("the cat sat on the mat and the dog ran to the door\n" * 12)
    write_rows(folder / "prompts.jsonl", [{"prompt": f"say {word}"} for word in ("apple", "pear", "plum", "fig", "a long list of fruit")])
    return folder


def rehearsal(folder):
    return {"data": str(folder / "general.txt"), "share": 0.25, "tokens": 40}


def watched(folder):
    return {"plain_text": str(folder / "general.txt"), "general_prompts": str(folder / "prompts.jsonl")}


def lines_of(folder, stage):
    return [json.loads(line) for line in (folder / f"out-{stage}" / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo"])
def test_two_processes_equal_one(place, stage):
    """60-odd rows of different lengths in batches of 8, into the second epoch; validation sets that 2 x 2 does not divide.

    SFT has general text mixed in, measures what it forgets, of five prompts, and thaws its layers; it completes five rows, and tells labels.
    """
    found = {}
    train, more = (TRAIN | {"rehearsal": rehearsal(place)}, {"health": watched(place), "evaluation": EVALUATED} | THAW) if stage == "sft" else (TRAIN, {})
    for processes in (1, 2):
        values = settings(place, stage, train, name=f"p{processes}", output=str(place / f"out-{stage}"), **more)
        done = run_apart(stage, values, place / f"{stage}.json", processes)
        assert done.returncode == 0, done.stderr
        found[processes] = {key: metrics(place, stage, key) for key in ("loss", "eval_loss", "objective", "rehearsal_loss", "token_accuracy")}
        found[processes] |= {key: [line[key] for line in lines_of(place, stage) if key in line] for key in FORGETTING + FOUND}
        assert done.stdout.count("published") == 1
    assert len(found[1]["loss"]) == 12
    assert len(found[1]["forgetting/perplexity"]) == (5 if stage == "sft" else 0)
    assert len(found[1]["evaluation/written"]) == (4 if stage == "sft" else 0)
    assert stage != "sft" or len(set(found[1]["evaluation/written"]) - {-1.0}) > 1, "something was written, and not always the same"
    for key in found[1]:
        assert found[2][key] == pytest.approx(found[1][key], rel=TOLERANCE, abs=1e-5 if key in FORGETTING else None)
    registry = Registry(place / "registry")
    one, two = (registry.resolve(f"{stage}/p{processes}") for processes in (1, 2))
    assert (one.info("processes"), two.info("processes")) == (1, 2)
    first, second = weights(one), weights(two)
    assert all(torch.allclose(first[name], second[name], rtol=1e-3, atol=1e-5) for name in first)
    assert one.info("test") is None or one.info("test")["results"][1]["metrics"] == pytest.approx(two.info("test")["results"][1]["metrics"], rel=1e-3)
    numbers = {key: value for key, value in one.info("metrics").items() if isinstance(value, float)}
    assert {key: two.info("metrics")[key] for key in numbers} == pytest.approx(numbers, rel=1e-3, abs=1e-5)


def test_a_killed_launcher_takes_its_processes_along_and_run_again_they_end_as_if_nothing_had_happened(place):
    long = {"max_steps": 40, "save_every": 5, "eval_every": 10, "micro_batch_size": 2, "rehearsal": rehearsal(place)}
    whole = settings(place, "sft", long, name="whole", output=str(place / "out-long"), health=watched(place), **THAW)
    done = run_apart("sft", whole, place / "long.json", 2)
    assert done.returncode == 0, done.stderr
    broken = whole | {"name": "broken"}
    process = subprocess.Popen(
        command("sft", broken, place / "long.json", 2), env=ENVIRONMENT, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (place / "out-long" / "resume" / "checkpoint-10" / "sealed.json").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)  # the launcher's; its processes must end with it
    process.wait()
    again = run_apart("sft", broken, place / "long.json", 2)
    assert again.returncode == 0, again.stderr
    assert "continuing from checkpoint-" in again.stdout
    first, second = (weights(Registry(place / "registry").resolve(f"sft/{name}")) for name in ("whole", "broken"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_user_error_under_two_processes_ends_all_of_them_with_one_message(place):
    values = settings(place, "sft", name="refused", output=str(place / "refused"), data=str(place / "missing.jsonl"))
    done = run_apart("sft", values, place / "refused.json", 2)
    assert done.returncode != 0
    assert sum(line.startswith("error: ") and "missing.jsonl" in line for line in done.stderr.splitlines()) == 1
    assert not Registry(place / "registry").list("sft", "refused")


def test_a_failure_to_publish_reaches_every_rank(place):
    """The registry's folder is a file: rank 0 fails, rank 1 learns of it, nothing hangs."""
    (place / "blocked").write_text("not a folder")
    values = settings(place, "sft", {"max_steps": 1}, name="refused", output=str(place / "refused"), registry=str(place / "blocked"))
    done = run_apart("sft", values, place / "refused.json", 2)
    assert done.returncode != 0
    assert any(line.startswith("error: ") for line in done.stderr.splitlines())


def test_a_user_error_of_one_process_is_one_line_and_exit_code_2(place):
    values = settings(place, "sft", name="refused", output=str(place / "refused"), data=str(place / "missing.jsonl"))
    done = subprocess.run(command("sft", values, place / "refused.json"), env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
