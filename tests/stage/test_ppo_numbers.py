"""PPO whose numbers go bad: the step is not taken, the iteration undone, and nothing broken is kept."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from configs.errors import UserError
from stages.guard import verdict
from stages.ppo import train, update
from stages.registry import Registry
from stages.training import saves as kept
from stages.training.saves import problem, saves
from tests.stage.ppo_runs import LORA, metrics, run, settings, weights, workspace


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return workspace(tmp_path_factory.mktemp("ppo-numbers"))


def case(place, name, train=None, **changes):
    """Six iterations of two optimizer steps, a save after each, no evaluation."""
    shape = {"iterations": 6, "num_ppo_epochs": 1, "save_every": 1}
    return settings(place, name, shape | (train or {}), **({"evaluation": None} | changes))


def lines_of(values):
    return [json.loads(line) for line in (Path(values["output"]) / "metrics.jsonl").read_text().splitlines()]


class Steps:
    """Counts the optimizer steps of runs, breaks some, and keeps the weights before each."""

    def __init__(self, monkeypatch, kind, at):
        self.before, self.kind, self.at = [], kind, at
        accumulate = update._accumulate

        def observed(module, *arguments, **keywords):
            trained = [p for p in module.parameters() if p.requires_grad]
            if kind == "weight" and len(self.before) in at:
                trained[0].detach().fill_(math.nan)
            self.before.append([p.detach().clone() for p in trained])
            number = len(self.before) - 1
            totals = accumulate(module, *arguments, **keywords)
            if number in at and kind != "weight":
                parameter = next(p for p in trained if p.grad is not None)
                parameter.grad.mul_({"gradient": math.nan, "spike": 1e5, "huge": 1e15}[kind])
            return totals

        monkeypatch.setattr(update, "_accumulate", observed)

    def unchanged(self):
        """Whether each step but the last left the weights as they were."""
        pairs = zip(self.before, self.before[1:], strict=False)
        return [all(torch.equal(a, b) for a, b in zip(one, other, strict=True)) for one, other in pairs]


@pytest.mark.parametrize("kind", ["gradient", "spike"])
@pytest.mark.parametrize("adapter", [None, LORA])
def test_a_minibatch_gone_bad_is_not_stepped_on(place, monkeypatch, capsys, kind, adapter):
    """Step 8 of 12, the second of iteration 4."""
    monkeypatch.setattr(verdict, "JUDGED_AFTER", 4)
    steps = Steps(monkeypatch, kind, {7})
    values = case(place, f"{kind}-{'full' if adapter is None else 'lora'}", lora=adapter)
    checkpoint = run(values)
    assert steps.unchanged() == [i == 7 for i in range(11)]
    assert all(torch.isfinite(tensor).all() for tensor in weights(checkpoint).values())
    assert [line["policy/skipped_steps"] for line in lines_of(values)] == [0, 0, 0, 1, 0, 0]
    assert [line["train/skipped_steps"] for line in lines_of(values)] == [0, 0, 0, 1, 1, 1]
    assert "warning: iteration 4: 1 optimizer step(s) of the run are skipped (8): the " in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["gradient", "weight"])
def test_an_iteration_gone_bad_is_undone(place, monkeypatch, capsys, kind):
    """Both steps of iteration 4 (gradients), or weights that are NaN from its first on: the save of iteration 3 is gone back to."""
    steps = Steps(monkeypatch, kind, {6, 7} if kind == "gradient" else {6})
    values = case(place, f"undone-{kind}")
    checkpoint = run(values)
    assert [line["iteration"] for line in lines_of(values)] == [1, 2, 3, 4, 5, 6]
    assert lines_of(values)[3] == {"iteration": 4, "train/skipped_steps": 2 if kind == "gradient" else 0, "train/back_to_iteration": 3}
    assert "Back to the weights and the optimizer of checkpoint-3" in capsys.readouterr().out
    first = steps.before[6] if kind == "gradient" else None
    assert first is None or all(torch.equal(a, b) for a, b in zip(first, steps.before[8], strict=True))
    assert all(torch.isfinite(tensor).all() for tensor in [*weights(checkpoint).values(), *steps.before[8]])


def test_after_an_iteration_was_undone_the_way_back_still_leads_to_where_the_run_began(place, monkeypatch):
    """Not to the save of iteration 3, whose weights were put in place."""
    found = {}
    for name, changes in (("there", {}), ("back", {"towards_start": 0.25})):
        values = case(place, f"undone-{name}", **changes)
        with monkeypatch.context() as patched:
            Steps(patched, "gradient", {6, 7})
            found[name] = weights(run(values))
        assert lines_of(values)[3]["train/back_to_iteration"] == 3
    start = weights(Registry(place / "registry").resolve("sft/one"))
    assert max((found["there"][name] - start[name]).abs().max() for name in start) > 1e-3
    for name in start:
        torch.testing.assert_close(found["back"][name], 0.25 * start[name] + 0.75 * found["there"][name])


@pytest.mark.parametrize("last", [False, True])
def test_an_iteration_of_spikes_alone_is_passed_over(place, monkeypatch, capsys, last):
    """Both steps of iteration 4 (or 6, the last), fewer than max_skipped_in_row: the weights are as they were, nothing is gone back to, and what is due is evaluated."""
    monkeypatch.setattr(verdict, "JUDGED_AFTER", 4)
    number = 6 if last else 4
    steps = Steps(monkeypatch, "huge", {2 * number - 2, 2 * number - 1})
    evaluation = {"every": 3 if last else 2, "prompts": str(place / "held_out.jsonl"), "samples_per_prompt": 1}
    values = case(place, f"passed-over-{number}", {"save_every": 50}, evaluation=evaluation)
    checkpoint = run(values)
    assert steps.unchanged() == [i // 2 + 1 == number for i in range(11)]
    assert [line["iteration"] for line in lines_of(values) if "evaluation/score" in line] == ([0, 3, 6] if last else [0, 2, 4, 6])
    found = {key: value for key, value in lines_of(values)[number].items() if not key.startswith("evaluation/")}
    assert found == {"iteration": number, "train/skipped_steps": 2}
    assert "nothing is learned from it" in capsys.readouterr().out
    assert all(torch.isfinite(tensor).all() for tensor in weights(checkpoint).values())


def test_the_second_time_in_a_row_the_run_stops_with_its_last_healthy_save(place, monkeypatch):
    Steps(monkeypatch, "gradient", {6, 7, 8, 9})
    values = case(place, "twice")
    with pytest.raises(UserError, match=r"iteration 5: no optimizer step.*again after the run had gone back to the save of iteration 3; the last healthy save is \S+checkpoint-4\."):
        run(values)
    newest, before = (load_file(save / "weights.safetensors") for save in saves(Path(values["output"]) / "resume") if problem(save) is None)
    assert all(torch.equal(tensor, before[name]) for name, tensor in newest.items()), "the save after iteration 4 holds what iteration 3 had learned"
    assert not Registry(place / "registry").list("ppo", "twice")


def test_an_iteration_called_off_is_saved_and_evaluated_where_that_is_due_and_pushes_no_healthy_save_out(place, monkeypatch):
    """Spikes alone in iterations 3 and 4, gradients that are NaN in 5: each is saved, the save of 2 outlives two newer ones and is gone back to. Cut after
    iteration 5, the run goes on from what that had made of it."""
    monkeypatch.setattr(verdict, "JUDGED_AFTER", 4)
    evaluation = {"every": 5, "prompts": str(place / "held_out.jsonl"), "samples_per_prompt": 1}
    whole, cut = (case(place, name, evaluation=evaluation) for name in ("called-off", "called-off-cut"))
    rate, made, seal = train.set_learning_rate, [], kept.seal

    def faulty(values, *, dies):
        with monkeypatch.context() as patch:
            Steps(patch, "gradient", {8, 9})
            Steps(patch, "huge", {4, 5, 6, 7})
            patch.setattr(kept, "seal", lambda folder, *rest: (made.append(folder.name), seal(folder, *rest)))
            patch.setattr(train, "set_learning_rate", lambda optimizer, cfg, iteration: 1 / 0 if iteration == 5 and dies else rate(optimizer, cfg, iteration))
            return run(values)

    expected = faulty(whole, dies=False)
    assert [name for name in made if "checkpoint" in name] == [f".staging-checkpoint-{number}" for number in range(1, 6)]
    assert [line.get("train/back_to_iteration") for line in lines_of(whole)] == [None, None, None, None, None, 2, None]
    assert [line["iteration"] for line in lines_of(whole) if "evaluation/score" in line] == [0, 5, 6]
    with pytest.raises(ZeroDivisionError):
        faulty(cut, dies=True)
    found = run(cut)
    assert metrics(whole) == metrics(cut)
    assert all(torch.equal(tensor, weights(found)[name]) for name, tensor in weights(expected).items())


def test_weights_that_are_not_finite_are_neither_saved_nor_kept_as_the_best(place, monkeypatch):
    """They break after the last step of iteration 4, whose metrics are sound; its save and its evaluation come after that."""
    original = train.run_iteration

    def breaking(cfg, accelerator, built, engine, optimizer, prompts, tokens, iteration, *arguments):
        found = original(cfg, accelerator, built, engine, optimizer, prompts, tokens, iteration, *arguments)
        if iteration == 3:
            built.trained.policy_parameters()[0].detach().view(-1)[0] = math.nan
        return found

    monkeypatch.setattr(train, "run_iteration", breaking)
    watched = {"evaluation": {"every": 1, "prompts": str(place / "held_out.jsonl")}}
    values = case(place, "kept", **watched)
    checkpoint = run(values)
    assert [line.get("train/back_to_iteration") for line in lines_of(values) if line["iteration"] == 4] == [3]
    assert all(torch.isfinite(tensor).all() for tensor in weights(checkpoint).values())


def test_a_run_resumed_after_a_skip_ends_as_the_uninterrupted_one(place, monkeypatch):
    """Step 6 is skipped; the second run breaks off in iteration 5."""
    monkeypatch.setattr(verdict, "JUDGED_AFTER", 4)
    whole, broken = case(place, "whole"), case(place, "broken")
    rate = train.set_learning_rate

    def crash(optimizer, cfg, iteration):
        return 1 / 0 if iteration == 4 else rate(optimizer, cfg, iteration)

    with monkeypatch.context() as patch:
        Steps(patch, "spike", {5})
        expected = run(whole)
    with monkeypatch.context() as patch:
        Steps(patch, "spike", {5})
        patch.setattr(train, "set_learning_rate", crash)
        with pytest.raises(ZeroDivisionError):
            run(broken)
    found = run(broken)
    lines = metrics(whole)
    assert lines == metrics(broken)
    assert lines[-1]["train/skipped_steps"] == 1
    assert all(torch.equal(tensor, weights(found)[name]) for name, tensor in weights(expected).items())


def test_with_nothing_wrong_the_guard_changes_no_bit(place):
    runs = [weights(run(case(place, f"guard-{on}".lower(), {"iterations": 3}, guard={"enabled": on}))) for on in (True, False)]
    assert all(torch.equal(tensor, runs[1][name]) for name, tensor in runs[0].items())


def test_a_scorer_that_returns_nan_is_named(place):
    with pytest.raises(UserError, match=r"scorer .*score 0 is nan; expected a finite number"):
        run(case(place, "scorer", scorers=[{"kind": "python", "function": "tests.stage.ppo_runs:broken"}]))
