"""`align sft --compare`: what is measured, and what a technique that can't be trained here says in its row."""

from __future__ import annotations

import json

import pytest

from configs.errors import UserError
from launch.cli import main
from launch.compare import run as comparing
from launch.compare.table import size, table
from launch.compare.techniques import TECHNIQUES
from launch.compare.worker import measured
from stages.registry import Registry
from tests.stage.runs import settings, workspace


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return workspace(tmp_path_factory.mktemp("compare"), rows=24, hidden=16)


def printed(rows) -> str:
    from rich.console import Console

    console = Console(width=160)
    with console.capture() as capture:
        console.print(table(rows, 3, "here"))
    return capture.get()


def test_what_is_measured_of_a_technique(place):
    """LoRA of rank 2 on every linear layer of 2 layers of width 16: q, o 16x16, k, v 8x16, gate, up 32x16, down 16x32."""
    values = settings(place, "sft", {"max_steps": 3, "eval_every": 3}, tune={"method": "lora", "rank": 2, "alpha": 4})
    found = measured(values)
    assert found["trainable"] == 2 * 2 * (2 * (16 + 16) + 2 * (16 + 8) + 3 * (16 + 32))
    whole = 259 * 16 + 2 * (2 * 16 * 16 + 2 * 8 * 16 + 3 * 16 * 32 + 2 * 16) + 16
    assert found["parameters"] == whole + found["trainable"]
    assert found["steps_per_second"] > 0
    assert 4 * found["trainable"] < found["bytes"] < 4 * found["trainable"] + 8192
    assert found["loss"] == pytest.approx(Registry(place / "registry").resolve("sft/tiny").info("metrics")["loss"])


def test_names_that_are_wrong_and_techniques_that_fail_are_rows_with_the_reason(place, monkeypatch, tmp_path):
    jobs = []

    def worker(job, folder):
        jobs.append(job)
        if job["tune"]["method"] == "qlora":
            return {"reason": "qlora: quantization nf4 needs an NVIDIA GPU and this run is on cpu; use method: lora"}
        return {"trainable": 10, "parameters": 100, "memory": 3 * 2**20, "steps_per_second": 2.5, "loss": 1.25, "validated": True, "bytes": 2048}

    monkeypatch.setattr(comparing, "run_worker", worker)
    config = tmp_path / "sft.yaml"
    config.write_text(json.dumps(settings(
        place, "sft", {"learning_rate": 1e-4}, lora={"rank": 3}, health={"plain_text": str(place / "missing.txt")},
        evaluation={"metrics": ["exact_match"], "generate": {"rows": 4}, "metric": "evaluation/exact_match"},
    )))  # fmt: skip
    rows = comparing.compare(str(config), ["train.weight_decay=0.1"], ["full", "lora", "qlora", "lorra"], 3, lambda _: None)
    assert [row.get("reason", "")[:18] for row in rows] == ["", "", "qlora: quantizatio", "no such technique;"]
    assert rows[3]["reason"].endswith("Did you mean lora?")
    assert [job["train"]["learning_rate"] for job in jobs] == [1e-4, pytest.approx(1e-3), pytest.approx(1e-3)]
    assert {(job["lora"], job["train"]["weight_decay"], job["train"]["max_steps"]) for job in jobs} == {(None, 0.1, 3)}
    assert all((job["evaluation"], job["health"]) == ({"test": False}, {"action": "off"}) for job in jobs), "neither is memory or time of a technique"
    assert not [job for job in jobs if str(place) in job["registry"] or str(place) in job["output"]], "nothing of the user's is written to"
    said = printed(rows)
    assert "│ 10.00% │ 3.0 MiB │    2.50 │ 1.250 │" in said
    assert "qlora: qlora: quantization nf4 needs an NVIDIA GPU" in said


def test_a_process_that_fails_says_why(tmp_path):
    found = comparing.run_worker({"name": "x"}, tmp_path / "a")
    assert "reason" in found


def test_what_can_not_be_compared_is_said(capsys):
    assert main(["sft", "--compare", "--dry-run"]) == 2
    assert "leave --dry-run" in capsys.readouterr().err
    assert main(["sft", "--compare", "--find-lr", "--registry", "elsewhere"]) == 2
    assert "leave --registry, --find-lr out" in capsys.readouterr().err
    for words, said in ((["--steps", "5"], "--steps: goes with --compare"), (["--lr-range", "1e-5:1:20"], "--lr-range 1e-5:1:20: goes with --find-lr")):
        assert main(["sft", "--config", "sft.yaml", *words]) == 2
        assert said in capsys.readouterr().err
    assert main(["sft"]) == 2
    assert "align sft needs --config FILE" in capsys.readouterr().err
    with pytest.raises(UserError, match="--steps 1: expected at least 2"):
        comparing.compare(None, [], ["full"], 1, print)


def test_every_method_of_the_schema_is_compared_and_has_a_word_on_when_to_use_it():
    from typing import get_args

    from configs.schema import Technique

    methods = {member.model_fields["method"].default for member in get_args(Technique)}
    assert {entry.tune["method"] for entry in TECHNIQUES.values()} == methods
    assert all(entry.when for entry in TECHNIQUES.values())
    assert [size(count) for count in (2048, 3 * 2**20, 2**31)] == ["2 KiB", "3.0 MiB", "2.0 GiB"]
