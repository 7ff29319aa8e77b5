"""`align sft --compare`: what is measured, and what a technique that can't be trained here says in its row."""

from __future__ import annotations

import io
import json
import os
import signal
from pathlib import Path

import pytest

from configs.errors import UserError
from launch.cli import main
from launch.compare import run as comparing
from launch.compare.place import NAME
from launch.compare.table import cells, short, show, size
from launch.compare.techniques import TECHNIQUES
from launch.compare.worker import measured
from stages.claim import Claim
from stages.registry import Registry
from tests.stage.runs import settings, workspace, write_rows
from tests.tiny import tiny_model

MEASURED = {"trainable": 10, "parameters": 100, "memory": 3 * 2**20, "steps_per_second": 2.5, "loss": 1.25, "validated": True, "bytes": 2048}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return workspace(tmp_path_factory.mktemp("compare"), rows=24, hidden=16)


def printed(rows, width=160, terminal=True) -> str:
    from rich.console import Console

    out = io.StringIO()
    show(rows, 3, "here", Console(width=width, force_terminal=terminal, color_system=None, file=out))
    return out.getvalue()


def test_what_is_measured_of_a_technique(place, monkeypatch):
    """LoRA of rank 2 on every linear layer of 2 layers of width 16: q, o 16x16, k, v 8x16, gate, up 32x16, down 16x32."""
    values = settings(place, "sft", {"max_steps": 3, "eval_every": 3}, tune={"method": "lora", "rank": 2, "alpha": 4})
    monkeypatch.setattr("transformers.Trainer._save_checkpoint", lambda *_: pytest.fail("a save that nobody resumes takes three times the model's room"))
    found = measured(values)
    assert found["trainable"] == 2 * 2 * (2 * (16 + 16) + 2 * (16 + 8) + 3 * (16 + 32))
    whole = 259 * 16 + 2 * (2 * 16 * 16 + 2 * 8 * 16 + 3 * 16 * 32 + 2 * 16) + 16
    assert found["parameters"] == whole + found["trainable"]
    assert found["steps_per_second"] > 0
    assert 4 * found["trainable"] < found["bytes"] < 4 * found["trainable"] + 8192
    assert found["loss"] == pytest.approx(Registry(place / "registry").resolve("sft/tiny").info("metrics")["loss"])


def test_memory_is_the_technique_s_and_not_the_process_s(tmp_path):
    """A model of P float32 weights, nearly all in one embedding of 4096 x 64, on rows of a few tokens: to train all of it takes 4 P bytes of weights, 4 P of gradients
    and 8 P of Adam's moments, 16 P; a technique that trains next to nothing takes the 4 P, and activations that are less than the optimizer's own scratch space."""
    tiny_model(tmp_path / "base", hidden=64, vocabulary=4096)
    write_rows(tmp_path / "sft.jsonl", [{"prompt": f"say {letter}", "completion": letter} for letter in "abcdefghijkl"])
    found = {}
    for name, tune in (("full", {"method": "full"}), ("lora", {"method": "lora", "rank": 4, "alpha": 8}), ("ia3", {"method": "ia3"}), ("again", {"method": "full"})):
        train = {"max_steps": 3, "eval_every": 3, "batch_size": 1, "micro_batch_size": 1}
        found[name] = measured(settings(tmp_path, "sft", train, tune=tune, split={"validation": 0.1, "test": 0}, evaluation={"test": False}, health={"action": "off"}))
    memory = {name: row["memory"] for name, row in found.items()}
    weights, trained = found["full"]["parameters"], found["lora"]["trainable"] - found["ia3"]["trainable"]
    assert 16 * weights < memory["full"] < 24 * weights
    assert memory["full"] - memory["ia3"] >= 12 * weights, "gradients and moments of all weights"
    assert memory["lora"] - memory["ia3"] >= 12 * trained, "of the adapters"
    assert memory["ia3"] > 4 * weights
    assert memory["again"] == memory["full"], "what the process has done before does not count"


def test_names_that_are_wrong_and_techniques_that_fail_are_rows_with_the_reason(place, monkeypatch, tmp_path):
    jobs = []

    def worker(job, folder):
        jobs.append(job)
        if job["tune"]["method"] == "qlora":
            return {"reason": "qlora: quantization nf4 needs an NVIDIA GPU and this run is on cpu; use method: lora"}
        return MEASURED

    monkeypatch.setattr(comparing, "run_worker", worker)
    config = tmp_path / "sft.yaml"
    config.write_text(json.dumps(settings(
        place, "sft", {"learning_rate": 1e-4}, output=str(tmp_path / "out"), lora={"rank": 3}, health={"plain_text": str(place / "missing.txt")},
        evaluation={"metrics": ["exact_match"], "generate": {"rows": 4}, "metric": "evaluation/exact_match"},
    )))  # fmt: skip
    rows = comparing.compare(str(config), ["train.weight_decay=0.1"], ["full", "lora", "qlora", "lorra"], 3, lambda _: None)
    assert [row.get("reason", "")[:18] for row in rows] == ["", "", "qlora: quantizatio", "no such technique;"]
    assert rows[3]["reason"].endswith("Did you mean lora?")
    assert [job["train"]["learning_rate"] for job in jobs] == [1e-4, pytest.approx(1e-3), pytest.approx(1e-3)]
    assert {(job["lora"], job["train"]["weight_decay"], job["train"]["max_steps"]) for job in jobs} == {(None, 0.1, 3)}
    assert all((job["evaluation"], job["health"]) == ({"test": False}, {"action": "off"}) for job in jobs), "neither is memory or time of a technique"
    assert {job["registry"] for job in jobs} == {str(tmp_path / "out" / NAME / name / "registry") for name in ("full", "lora", "qlora")}, "on the disk of the results, in no registry of the user's"
    assert not (tmp_path / "out").exists()
    said = printed(rows)
    assert "10.00%   3.0 MiB      2.50   1.250 " in said
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


@pytest.fixture
def config(place, tmp_path):
    """A config file whose output is in `tmp_path`."""
    file = tmp_path / "sft.yaml"
    file.write_text(json.dumps(settings(place, "sft", output=str(tmp_path / "runs/out"))))
    return str(file)


def test_each_technique_s_folder_goes_with_its_row_and_a_killed_comparison_s_with_the_next(config, tmp_path, monkeypatch):
    work, seen, said = tmp_path / "runs/out" / NAME, [], []
    (work / "dora").mkdir(parents=True)
    (work / "dora/model.safetensors").write_bytes(b"left by kill -9")

    def worker(job, folder):
        seen.append(sorted(path.name for path in work.iterdir()))
        (folder / "registry").mkdir(parents=True)
        return MEASURED

    monkeypatch.setattr(comparing, "run_worker", worker)
    assert len(comparing.compare(config, [], ["full", "lora", "ia3"], 3, said.append)) == 3
    assert seen == [[".lock"]] * 3
    assert said[0] == f"removing what a comparison that was killed has left in {work}"
    assert [path.name for path in (tmp_path / "runs").rglob("*")] == ["out"], "the folder that was there before"
    with Claim(work, "align sft --compare"), pytest.raises(UserError, match="works in this folder already"):
        comparing.compare(config, [], ["full"], 3, said.append)
    assert work.exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_told_to_end_it_leaves_nothing(config, tmp_path, monkeypatch, number):
    def worker(job, folder):
        (folder / "registry").mkdir(parents=True)
        os.kill(os.getpid(), number)
        pytest.fail("told to end, it went on")

    monkeypatch.setattr(comparing, "run_worker", worker)
    with pytest.raises(SystemExit) as left:
        comparing.compare(config, [], ["full", "lora"], 3, lambda _: None)
    assert left.value.code == 85
    assert not (tmp_path / "runs").exists()


def test_the_model_that_it_makes_lies_in_the_same_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("launch.demo.base.train_base", lambda output, steps: Path(output).mkdir(parents=True))
    jobs = []
    monkeypatch.setattr(comparing, "run_worker", lambda job, folder: jobs.append(job) or {"reason": "no"})
    comparing.compare(None, [], ["neftune"], 3, lambda _: None)
    assert jobs[0]["init_from"] == str(Path("runs/sft-compare").resolve() / NAME / "built-in/base")
    assert (jobs[0]["tune"], jobs[0]["train"]["neftune_alpha"]) == ({"method": "full"}, 5.0)
    assert not list(tmp_path.iterdir())


SHOWN = [
    MEASURED | {"technique": name, "when": entry.when, "learning_rate": 2.5e-6 * entry.rate, "trainable": 1_234_567_890 // 7**place, "parameters": 1_634_567_890, "memory": 21.4 * 2**30,
                "bytes": 953.7 * 2**20}
    for place, (name, entry) in enumerate(TECHNIQUES.items())
]  # fmt: skip


@pytest.mark.parametrize(("width", "terminal"), [(80, True), (120, True), (160, True), (80, False)])
def test_no_number_is_cut_at_any_width(width, terminal):
    said = printed([*SHOWN, {"technique": "qlora", "reason": "no GPU " * 40}], width, terminal)
    assert "…" not in said
    lines = said.splitlines()
    if terminal:
        assert max(map(len, lines)) <= width
    wide = not terminal or width == 160
    for row in SHOWN:
        [line] = [line for line in lines if line.startswith(f"{row['technique']} ")]
        assert " ".join(line.split()).startswith(" ".join(cells(row, narrow=not wide)))
        assert row["when"] in (line if not terminal or width > 80 else said)
    assert ("use it when:" in lines) == (terminal and width == 80), "below the table where there is no room beside it"
    assert terminal or "no GPU " * 40 in said + " "


def test_where_nothing_was_measured_the_reason_alone_is_said():
    assert printed([{"technique": "qlora", "reason": "no GPU " * 40}], 80, terminal=False) == "not measured:\n  qlora: " + "no GPU " * 40 + "\n"


def test_numbers_are_short_where_room_is():
    assert [size(count) for count in (2048, 3 * 2**20, 2**31)] == ["2 KiB", "3.0 MiB", "2.0 GiB"]
    assert [short(count) for count in (640, 78_336, 999_600, 1_235_000, 7_615_616_512)] == ["640", "78.3k", "1M", "1.24M", "7.62B"]
    assert [cells(SHOWN[0] | {"trainable": count, "parameters": 10_000_000}, narrow=True)[2] for count in (10_000_000, 10_000, 9_000, 90)] == ["100.00%", "0.10%", "0.090%", "<0.001%"]


# Sizes and details of a technique, of which a comparison takes one value, and what is said by another field.
NO_TECHNIQUES = {
    "method", "rank", "alpha", "dropout", "target_modules", "quantization", "feedforward_modules", "virtual_tokens", "init_text", "prefix_projection", "encoder_hidden_size", "encoder",
    "encoder_layers", "encoder_dropout", "first", "patterns", "norms",
}  # fmt: skip
NO_TECHNIQUES_OF_TRAINING = {"rehearsal", "loss_chunk", "group_by_length"}


def test_every_technique_of_the_schema_is_compared_and_has_a_word_on_when_to_use_it():
    from typing import get_args

    from configs.schema import Technique
    from configs.schema.common import Lora, Train
    from configs.schema.supervised import SFTTrain
    from configs.schema.tuning import Freeze

    members = get_args(Technique)
    tunes = [entry.tune for entry in TECHNIQUES.values()]
    assert {tune["method"] for tune in tunes} == {member.model_fields["method"].default for member in members}
    fields = {name for member in (*members, Freeze) for name in member.model_fields}
    compared = {key for tune in tunes for key in (*tune, *tune.get("freeze", {}))}
    assert fields - NO_TECHNIQUES == compared - NO_TECHNIQUES, "a technique without a row, or a name in NO_TECHNIQUES that is needless"
    assert fields >= NO_TECHNIQUES
    starts = set(get_args(Lora.model_fields["init"].annotation))
    assert {tune.get("init", "default") for tune in tunes} == starts
    how = set(SFTTrain.model_fields) - set(Train.model_fields) - NO_TECHNIQUES_OF_TRAINING
    assert {key for entry in TECHNIQUES.values() for key in entry.train} == how | {"weight_decay"}
    assert all(entry.when for entry in TECHNIQUES.values())


def test_every_row_is_a_config_and_unfreezing_happens_within_the_steps():
    from configs.schema import SFTStage

    for entry in TECHNIQUES.values():
        for steps in (2, 12):
            job = comparing.job_of(entry, {"init_from": "base", "data": "rows.jsonl", "train": {"batch_size": 8}}, Path("work"), steps)
            found = SFTStage.model_validate(job)
            assert found.train.max_steps == steps
    assert [TECHNIQUES["unfreeze"].sections(steps)["tune"]["freeze"]["unfreeze_every"] for steps in (2, 12, 40)] == [1, 3, 10]
