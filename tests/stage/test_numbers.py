"""SFT, reward model and DPO whose numbers go bad: the step is not taken, the run goes back once, and nothing broken is kept."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from configs.errors import UserError
from configs.exit_codes import REQUEUE
from stages.guard import verdict
from stages.registry import Registry
from stages.training import stop
from stages.training.saves import problem, saves
from tests.stage.numbers import injected, same
from tests.stage.runs import run, run_until, settings, weights, workspace


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return workspace(tmp_path_factory.mktemp("numbers"))


def lines_of(values):
    return [json.loads(line) for line in (Path(values["output"]) / "metrics.jsonl").read_text().splitlines()]


def case(place, stage, name, train=None, **changes):
    return settings(place, stage, {"max_steps": 8, "save_every": 3, "eval_every": 8} | (train or {}), name=name, output=str(place / f"{stage}-{name}"), **changes)


MATRIX = [("sft", "batch"), ("sft", "gradient"), ("sft", "spike"), ("reward", "gradient"), ("dpo", "batch")]


@pytest.mark.parametrize(("stage", "kind"), MATRIX)
def test_a_step_gone_bad_is_not_taken(place, capsys, monkeypatch, stage, kind):
    """Weights, moments and step counts after step 5 are those after step 4; the log names the step and its rows; the next steps go on."""
    monkeypatch.setattr(verdict, "JUDGED_AFTER", 4)
    values = case(place, stage, kind, {"save_every": 8})
    with injected(kind, {5}) as recorded:
        checkpoint = run(stage, values)
    after = recorded[0].steps
    assert [same(after[i], after[i + 1]) for i in range(8)] == [False] * 4 + [True] + [False] * 3
    assert all(torch.isfinite(tensor).all() for tensor in weights(checkpoint).values())
    said = capsys.readouterr().out
    assert said.count("warning: step 5 is skipped: the ") == 1
    lines = [line for line in lines_of(values) if "train/skipped_steps" in line]
    assert [line["train/skipped_steps"] for line in lines] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert [math.isnan(line[f"{stage}/loss"]) for line in lines] == [i == 4 and kind == "batch" for i in range(8)], "a NaN loss is shown, once"
    if kind == "spike":
        assert "times its median" in said


def test_the_rows_that_are_named_are_those_of_the_step(place, capsys):
    """Each row's number stands in its prompt."""
    from stages.training import build

    seen = {}
    order = build.in_order

    def observed(rows, plan, seed):
        seen.update(rows=rows, order=order(rows, plan, seed), size=plan.batch_size)
        return seen["order"]

    with pytest.MonkeyPatch.context() as patch, injected("batch", {2}):
        patch.setattr(build, "in_order", observed)
        run("sft", case(place, "sft", "rows", {"max_steps": 2}))
    named = capsys.readouterr().out.split("its training rows: ")[1].splitlines()[0]
    fed = seen["order"].select(range(seen["size"], 2 * seen["size"]))["input_ids"]
    assert sorted(map(tuple, fed)) == sorted(tuple(seen["rows"][int(number)]["input_ids"]) for number in named.split(", "))


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_weights_gone_bad_are_undone_once(place, capsys, stage):
    """NaN from step 4 on: 4 and 5 are skipped, the run goes back to the save of step 3, and its end is finite."""
    values = case(place, stage, "weight", guard={"max_skipped_in_row": 2}, lora={"rank": 4, "alpha": 8} if stage == "dpo" else None)
    with injected("weight", {4}) as recorded:
        checkpoint = run(stage, values)
    after = recorded[0].steps
    assert same(after[5], after[3])
    assert not same(after[6], after[5])
    assert all(torch.isfinite(tensor).all() for tensor in weights(checkpoint).values())
    assert "Back to the weights and the optimizer of checkpoint-3; the rows of steps 4 to 5 are not trained on again" in capsys.readouterr().out
    rates = [line["learning_rate"] for line in lines_of(values) if "learning_rate" in line]
    assert rates == pytest.approx([1e-3 * (8 - i) / 8 for i in range(8)]), "the schedule goes on"


@pytest.mark.parametrize("end", [False, True])
def test_steps_skipped_in_a_row_count_also_where_they_are_over_at_the_next_log(place, capsys, end):
    """Steps 4 and 5 are skipped and 6 is taken; nothing is logged, evaluated or saved before step 6, or before the end. The run went on, and published."""
    train = {"max_steps": 7, "log_every": 10, "eval_every": 10, "save_every": 10 if end else 3}
    with injected("gradient", {4, 5}) as recorded:
        run("sft", case(place, "sft", f"over-{end}".lower(), train, guard={"max_skipped_in_row": 2}))
    said = capsys.readouterr().out
    after = recorded[0].steps
    if end:
        assert "2 optimizer steps in a row were skipped, the last because the gradient is not finite. No step is left: the weights are those of the last step that was taken, 7" in said
    else:
        assert same(after[6], after[3])
        assert "2 optimizer steps in a row were skipped, the last because the gradient is not finite. Back to the weights and the optimizer of checkpoint-3; the rows of steps 4 to 6 are" in said


def test_the_second_time_in_a_row_the_run_stops_with_its_last_healthy_save(place):
    values = case(place, "sft", "twice", guard={"max_skipped_in_row": 2})
    with injected("weight", {4, 6}), pytest.raises(UserError, match=r"a trained weight is not finite at step 6, again after .* of step 3; the last healthy save is \S+checkpoint-3\."):
        run("sft", values)
    assert [(save.name, problem(save)) for save in saves(Path(values["output"]) / "resume")] == [("checkpoint-3", None)]
    assert not Registry(place / "registry").list("sft", "twice")
    run("sft", values)  # the fault is gone: the same command goes on from there
    assert Registry(place / "registry").resolve("sft/twice").version == 1


def test_told_to_stop_while_a_weight_is_not_finite_it_leaves_with_the_newest_healthy_save(place, capsys, monkeypatch):
    """It ended with 2, as if the user had done something wrong, and was not started again."""
    def told(agreement):
        agreement._steps += 1
        agreement.code = REQUEUE if agreement._steps == 5 else 0
        return agreement.code

    values = case(place, "sft", "told")
    with injected("weight", {5}), monkeypatch.context() as patch:
        patch.setattr(stop.Agreement, "at_step_end", told)
        with pytest.raises(SystemExit) as left:
            run("sft", values)
    assert left.value.code == REQUEUE
    assert "nothing is saved, for a trained weight is not finite, at step 5 of 8; the same command continues from its newest save" in capsys.readouterr().out
    assert [(save.name, problem(save)) for save in saves(Path(values["output"]) / "resume")] == [("checkpoint-3", None)]
    found = run("sft", values)
    assert "continuing from checkpoint-3" in capsys.readouterr().out
    expected = weights(run("sft", case(place, "sft", "not-told")))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(found).items())


def test_the_last_steps_skipped_leave_what_was_learned_before(place, capsys):
    """What was not taken has changed nothing; the run ended with 2 and published nothing."""
    with injected("batch", {7, 8}) as recorded:
        run("sft", case(place, "sft", "last", guard={"max_skipped_in_row": 2}))
    assert same(recorded[0].steps[8], recorded[0].steps[6])
    assert "warning: 2 optimizer steps in a row were skipped, the last because the loss is not finite and the gradient is not finite. No step is left: the weights are those of the last step that was taken, 6" in capsys.readouterr().out


def test_a_run_that_skipped_most_of_its_steps_is_not_published(place):
    values = case(place, "sft", "most")
    with injected("batch", {4, 5, 6, 7, 8}), pytest.raises(UserError, match=r"5 optimizer steps in a row were skipped.* at step 8; the last healthy save is \S+checkpoint-3") as refused:
        run("sft", values)
    assert "fp32" not in str(refused.value), "it is what this run computes in"
    assert not Registry(place / "registry").list("sft", "most")


def test_a_save_made_since_allows_another_way_back(place, capsys):
    """Broken at 4 and, after the save of step 6, again at 8."""
    with injected("weight", {4, 8}):
        run("sft", case(place, "sft", "twice-apart", {"max_steps": 12}, guard={"max_skipped_in_row": 2}))
    said = capsys.readouterr().out
    assert "optimizer of checkpoint-3; the rows of steps 4 to 5 are" in said
    assert "optimizer of checkpoint-6; the rows of steps 7 to 9 are" in said


def test_a_run_resumed_after_a_skip_ends_as_the_uninterrupted_one(place, monkeypatch):
    """Skipped at 2, spike at 5 and 7: what is remembered of the first steps decides of the last, across the save of step 6."""
    monkeypatch.setattr(verdict, "JUDGED_AFTER", 4)
    whole, broken = (case(place, "sft", name) for name in ("whole", "broken"))
    with injected("spike", {2, 6, 8}):
        expected = run("sft", whole)
        run_until("sft", broken, 7)
        found = run("sft", broken)
    assert lines_of(broken) == lines_of(whole)
    assert [line["train/skipped_steps"] for line in lines_of(whole) if "learning_rate" in line] == [0, 0, 0, 0, 0, 1, 1, 2]
    assert all(torch.equal(tensor, weights(found)[name]) for name, tensor in weights(expected).items())


def test_a_model_whose_validation_loss_is_not_finite_is_not_published(place, monkeypatch):
    from stages.training import build

    monkeypatch.setattr(build, "final_metrics", lambda *_: {"loss": math.nan})
    with pytest.raises(UserError, match="loss on its validation rows is nan, so it is not published"):
        run("sft", case(place, "sft", "huge", {"max_steps": 1}))
    assert not Registry(place / "registry").list("sft", "huge")


def test_with_nothing_wrong_the_guard_changes_no_bit(place):
    runs = [weights(run("sft", case(place, "sft", f"guard-{on}".lower(), guard={"enabled": on}))) for on in (True, False)]
    assert all(torch.equal(tensor, runs[1][name]) for name, tensor in runs[0].items())


def test_a_parent_that_is_not_finite_is_refused(place, tmp_path):
    """A folder whose weights hold a NaN, as the start of a stage."""
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(place / "base", tmp_path / "nan")
    tensors = load_file(tmp_path / "nan" / "model.safetensors")
    next(iter(tensors.values())).view(-1)[0] = math.nan
    save_file(tensors, tmp_path / "nan" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="NaN or infinite"):
        run("sft", case(place, "sft", "parent", init_from=str(tmp_path / "nan")))
