"""Validation of SFT: completions during training, what is stopped and chosen by them, and the final test."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import pytest
import torch

from configs.errors import UserError
from stages.registry import Registry
from tests.stage.runs import run, settings, weights, workspace, write_rows
from tests.stage.test_sft import by_hand, encoded

OWN = {"kind": "python", "function": "tests.stage.test_sft_evaluation:spread"}
EVALUATED = {"metrics": ["exact_match", "chrf", "rouge", OWN], "generate": {"rows": 4, "max_new_tokens": 12}}
SEEN: list[list[str]] = []  # completions that `spread` was called with, in turn
FAILS: list[int] = []  # numbers of calls, counted by SEEN, in which it fails


def spread(prompts, completions, references):
    """Distinct characters of the completions and, in thousandths, how many there are."""
    SEEN.append(completions)
    if len(SEEN) in FAILS:
        raise RuntimeError("no luck")
    return len(set("".join(completions))) + len("".join(completions)) / 1000


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return workspace(tmp_path_factory.mktemp("evaluated"))


@pytest.fixture
def module(monkeypatch):
    """A module that a test puts its metric into, as own_metrics:f."""
    made = types.ModuleType("own_metrics")
    monkeypatch.setitem(sys.modules, "own_metrics", made)
    return made


def own(**generate):
    return {"metrics": [{"kind": "python", "function": "own_metrics:f"}], "generate": {"rows": 3, "max_new_tokens": 4} | generate}


def config(place, name, train=None, evaluation=None, **changes):
    return settings(place, "sft", train, name=name, output=str(place / name), evaluation=evaluation or EVALUATED, **changes)


def lines(values):
    """What evaluations wrote into metrics.jsonl, without the seconds they took."""
    rows = [json.loads(line) for line in (Path(values["output"]) / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "evaluation/seconds"} for row in rows]


@pytest.fixture(scope="module")
def published(place):
    """One run with everything: chosen by chrF, generating at every evaluation. (config, checkpoint)"""
    values = config(place, "whole", {"max_steps": 6, "eval_every": 2, "learning_rate": 6e-2}, EVALUATED | {"metric": "evaluation/chrf"})
    return values, run("sft", values)


def test_completions_are_those_of_plain_greedy_generation(place, published):
    """What transformers' own generate writes from the published model, row by row."""
    from transformers import AutoModelForCausalLM

    from configs.schema import SFTStage
    from stages import data, models
    from stages.tokens import load_tokens
    from stages.validation.rows import drawn

    values, checkpoint = published
    cfg = SFTStage.model_validate(values)
    formatter = load_tokens(models.find(cfg.init_from, cfg.registry)).formatter
    rows = data.Splitter(cfg.split).split(data.read_demonstrations(cfg.data).rows).validation
    questions = drawn(rows, formatter, count=4, seed=0, room=500)
    assert len(questions) == 4 < len(rows)
    assert questions == drawn(rows[::-1], formatter, count=4, seed=0, room=500), "the same rows, whatever their order in the file"
    assert questions != drawn(rows, formatter, count=4, seed=1, room=500)
    model = AutoModelForCausalLM.from_pretrained(checkpoint.model_dir)
    texts = []
    for question in questions:
        ids = torch.tensor([question.prompt_ids])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, eos_token_id=258, pad_token_id=256)
        texts.append(formatter.completion_text(out[0, ids.shape[1] :].tolist()))
    assert SEEN[-2] == texts, "the last but one call was for the published state's validation rows, the last for the test part"
    assert any(texts)
    assert checkpoint.info("metrics")["evaluation/spread"] == spread([], texts, [])


def test_every_metric_is_written_under_one_name_and_the_older_names_stay(published, capsys):
    values, checkpoint = published
    evaluations = [row for row in lines(values) if "evaluation/loss" in row]
    assert [row["step"] for row in evaluations] == [2, 4, 6]
    names = {"evaluation/loss", "evaluation/perplexity", "evaluation/token_accuracy", "evaluation/exact_match", "evaluation/chrf", "evaluation/rouge1", "evaluation/rouge2", "evaluation/rougeL", "evaluation/spread"}
    for row in evaluations:
        assert names <= row.keys()
        assert (row["sft/eval_loss"], row["sft/eval_token_accuracy"]) == (row["evaluation/loss"], row["evaluation/token_accuracy"])
        assert row["evaluation/perplexity"] == pytest.approx(torch.tensor(row["evaluation/loss"], dtype=torch.float64).exp().item())
    found = checkpoint.info("metrics")
    assert names | {"loss", "token_accuracy"} == found.keys()
    assert found["loss"] == found["evaluation/loss"]
    best = max(evaluations, key=lambda row: row["evaluation/chrf"])
    assert best is evaluations[1], "neither the first nor the last, or the test says little"
    assert {name: found[name] for name in names} == pytest.approx({name: best[name] for name in names}, rel=1e-6)


def test_numbers_from_other_rows_or_settings_are_not_compared(place, published):
    """Loss on all validation rows, generated metrics on the subset, and both of the test part: four sets."""
    registry = Registry(place / "registry")
    results = registry.evaluations(published[1])
    parts = published[1].info("data")["parts"]
    assert [result["eval_set"] for result in results][::2] == [parts["validation"], parts["test"]]
    assert len({result["eval_set"] for result in results}) == 4
    assert registry.resolve("sft/whole@best:evaluation/rougeL").id == registry.resolve("sft/whole@best:loss").id == published[1].id
    assert all(key.startswith("test/") for result in results[2:] for key in result["metrics"])


def test_neither_the_generation_batch_nor_the_forward_batch_changes_anything(place, published):
    generate = EVALUATED["generate"] | {"batch_size": 1}
    values = config(place, "cut", {"max_steps": 6, "eval_every": 2, "learning_rate": 6e-2, "micro_batch_size": 1}, published[0]["evaluation"] | {"generate": generate})
    run("sft", values)
    for mine, theirs in zip(lines(values), lines(published[0]), strict=True):
        shown = {key for key in mine if key.startswith("evaluation/")}
        assert {key: mine[key] for key in shown} == pytest.approx({key: theirs[key] for key in shown}, rel=1e-5)


@pytest.fixture(scope="module")
def there(place):
    """Where four steps at a constant rate lead to; a run without a test part, which has nothing to test."""
    return run("sft", config(place, "there", {"max_steps": 4, "schedule": "constant"}, {"test": True}, split={"validation": 0.1, "test": 0.0}))


def test_the_published_state_is_the_one_that_the_metric_says(place, module, there):
    """A metric that peaks at the second of the evaluations that generate, every other one: the weights published are those of a run that ends there."""
    calls = iter([0.0, 0.1, 0.9, 0.3, 0.2, 0.0])  # before training; at steps 2, 4, 6 and 7; of the published state
    module.f = lambda prompts, completions, references: next(calls)
    values = config(place, "peak", {"max_steps": 7, "eval_every": 1, "schedule": "constant"}, own(every=2) | {"metric": "evaluation/f", "mode": "max", "test": False})
    values["split"] = {"validation": 0.1, "test": 0.0}
    best = run("sft", values)
    assert [row["step"] for row in lines(values) if "evaluation/f" in row] == [2, 4, 6, 7]
    assert [row["step"] for row in lines(values) if "evaluation/loss" in row] == [1, 2, 3, 4, 5, 6, 7]
    assert all(torch.equal(tensor, weights(there)[name]) for name, tensor in weights(best).items())
    assert best.info("test") is there.info("test") is None
    assert len(Registry(place / "registry").evaluations(there)) == 1


def test_less_is_better_where_the_config_says_so_and_early_stopping_counts_improvements(place, module, there, capsys):
    """0.90, 0.50, 0.49, 0.48: the last two gain too little on 0.50, and the run stops there; the best of all is published."""
    calls = iter([0.0, 0.90, 0.50, 0.49, 0.48, 0.0])
    module.f = lambda prompts, completions, references: next(calls)
    stop = {"metric": "evaluation/f", "mode": "min", "early_stopping": {"patience": 2, "min_improvement": 0.05}, "test": False}
    values = config(place, "stops", {"max_steps": 20, "eval_every": 1, "schedule": "constant"}, own() | stop, split={"validation": 0.1, "test": 0.0})
    checkpoint = run("sft", values)
    assert [row["step"] for row in lines(values) if "evaluation/f" in row] == [1, 2, 3, 4]
    assert "stopped early: no better evaluation/f by more than 0.05 in 2 evaluations" in capsys.readouterr().out
    assert all(torch.equal(tensor, weights(there)[name]) for name, tensor in weights(checkpoint).items())


def test_a_function_is_given_the_further_columns_of_its_rows(place, module):
    """`level` is the row's number; nested columns, and one that would take the place of a list of ours, are left out."""
    rows = [json.loads(line) for line in (place / "sft.jsonl").read_text().splitlines()]
    more = write_rows(place / "more.jsonl", [row | {"level": n, "tags": ["a"], "references": "b"} for n, row in enumerate(rows)])
    seen = []

    def f(prompts, completions, references, **columns):
        seen.append((prompts, columns))
        return sum(columns["level"])

    module.f = f
    checkpoint = run("sft", config(place, "columns", {"max_steps": 1}, own(max_new_tokens=1), data=str(more)))
    numbers = {row["prompt"]: n for n, row in enumerate(rows)}
    assert all(list(columns) == ["level"] and columns["level"] == [numbers[prompt] for prompt in prompts] for prompts, columns in seen)
    assert checkpoint.info("metrics")["evaluation/f"] == sum(numbers[prompt] for prompt in seen[-2][0]), "the last call was for the test part"


class Interrupted(Exception):
    """Stands for a crash."""


def test_interrupted_and_run_again_it_publishes_the_same_best(place, monkeypatch, published, capsys):
    """A function that fails at the second evaluation, mended; a crash before publishing: metrics, weights and choice are those of the uninterrupted run."""
    from stages.training import publish

    whole, expected = published
    values = whole | {"name": "broken", "output": str(place / "broken")}
    FAILS.append(len(SEEN) + 3)  # it is called before training, at step 2, and at step 4
    with pytest.raises(UserError, match=r"metric tests\.stage\.test_sft_evaluation:spread: failed on .*RuntimeError: no luck"):
        run("sft", values)
    with monkeypatch.context() as patch:
        patch.setattr(publish, "publish_checkpoint", lambda *a, **k: (_ for _ in ()).throw(Interrupted))
        with pytest.raises(Interrupted):
            run("sft", values)
    assert "continuing from checkpoint-2" in capsys.readouterr().out
    found = run("sft", values)
    assert "continuing from checkpoint-6" in capsys.readouterr().out
    assert lines(values) == lines(whole)
    assert all(torch.equal(tensor, weights(expected)[name]) for name, tensor in weights(found).items())
    assert found.info("metrics") == expected.info("metrics")
    assert found.info("test") == expected.info("test")


class TestTheFinalTest:
    def test_its_numbers_are_those_of_the_published_weights_on_the_test_rows(self, place, published):
        from transformers import AutoModelForCausalLM

        record = published[1].info("test")
        rows = encoded(place, "test")
        loss, accuracy = by_hand(AutoModelForCausalLM.from_pretrained(published[1].model_dir), rows)
        numbers = {key: value for result in record["results"] for key, value in result["metrics"].items()}
        assert numbers["test/loss"] == pytest.approx(loss, rel=1e-5)
        assert numbers["test/token_accuracy"] == pytest.approx(accuracy)
        assert (record["rows"], record["completed"], record["taken_from"]) == (len(rows), 4, None)
        assert {"test/perplexity", "test/exact_match", "test/chrf", "test/rougeL"} <= numbers.keys()

    def test_weights_that_were_measured_are_not_measured_again(self, place, published, monkeypatch, capsys):
        """The run repeated ends with the same weights; its second version has the numbers of the first."""
        from stages.validation import outcome

        monkeypatch.setattr(outcome, "evaluate_exactly", lambda *_: pytest.fail("measured a second time"))
        again = run("sft", published[0])
        assert again.version == 2
        assert again.info("test") == published[1].info("test") | {"taken_from": "sft/whole@1"}
        assert Registry(place / "registry").evaluations(again) == Registry(place / "registry").evaluations(published[1])
        assert "as measured for sft/whole@1, which has the same weights; not measured again" in capsys.readouterr().out


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """A workspace with rows that are told apart by two labels, one of them in two spellings."""
    place = workspace(tmp_path_factory.mktemp("labels"))
    rows = [{"prompt": f"is {n} even", "completion": ["yes", "No way", "no way"][0 if n % 2 == 0 else 1 + n % 3 // 2]} for n in range(80)]
    write_rows(place / "labels.jsonl", rows)
    return place


class TestLabels:
    def test_the_label_of_the_highest_likelihood_is_told(self, labelled):
        """LoRA; the labels come from the training rows, spellings that differ in case are one."""
        from peft import AutoPeftModelForCausalLM

        from configs.schema import SFTStage
        from stages import data, models
        from stages.tokens import load_tokens

        values = config(labelled, "told", {"max_steps": 10, "learning_rate": 1e-2}, {"metrics": ["accuracy"]}, data=str(labelled / "labels.jsonl"), lora={"rank": 4})
        values["split"] = {"validation": 0.2, "test": 0.1}
        checkpoint = run("sft", values)
        cfg = SFTStage.model_validate(values)
        formatter = load_tokens(models.find(cfg.init_from, cfg.registry)).formatter
        parts = data.Splitter(cfg.split).split(data.read_demonstrations(cfg.data).rows)
        model, right = AutoPeftModelForCausalLM.from_pretrained(checkpoint.model_dir).eval(), 0
        for row in parts.validation:
            scores = {}
            for label in ("No way", "yes"):
                prompt, ids = formatter.prompt_ids(row.prompt), formatter.completion_ids(label, row.prompt)
                with torch.no_grad():
                    logprobs = model(torch.tensor([prompt + ids])).logits[0].double().log_softmax(-1)
                scores[label] = sum(logprobs[len(prompt) + i - 1, token].item() for i, token in enumerate(ids))
            right += max(scores, key=scores.__getitem__).casefold() == row.completion.casefold()
        assert checkpoint.info("metrics")["evaluation/accuracy"] == pytest.approx(right / len(parts.validation))
        assert "test/macro_f1" in checkpoint.info("test")["results"][1]["metrics"]

    def test_what_is_no_set_of_labels_is_refused(self, place, labelled):
        many = write_rows(place / "many.jsonl", [{"prompt": f"say {n}", "completion": f"it is {n}"} for n in range(100)])
        with pytest.raises(UserError, match=r"accuracy is of labels, and the \d+ training rows have \d+ distinct completions of up to \d+ characters, which is no set of labels.*exact_match"):
            run("sft", config(place, "many", {"max_steps": 1}, {"metrics": ["accuracy"]}, data=str(many)))
        with pytest.raises(UserError, match=r"labels\.jsonl:\d+: the completion is none of evaluation\.labels \('yes', 'maybe'\)"):
            run("sft", config(labelled, "other", {"max_steps": 1}, {"metrics": ["accuracy"], "labels": ["yes", "maybe"]}, data=str(labelled / "labels.jsonl")))


class TestFaults:
    """A function that misbehaves ends the run before its first step, with its name."""

    @pytest.mark.parametrize(
        ("function", "message"),
        [
            (lambda prompts, completions, references: 1 / 0, "metric own_metrics:f: failed on prompt 0 of 3: ZeroDivisionError"),
            (lambda prompts, completions, references: float("nan"), "metric own_metrics:f: returned nan; expected a finite number"),
            (lambda prompts, completions, references: [1.0] * 5, "metric own_metrics:f: returned a list of 5; expected one number"),
            (lambda prompts, completions, references: {"bleu": 1.0}, "names a metric 'bleu', which is one of ours"),
        ],
    )
    def test_before_anything_is_trained(self, place, module, function, message):
        module.f = function
        with pytest.raises(UserError, match=message):
            run("sft", config(place, "fault", {"max_steps": 2}, own()))
        assert not (place / "fault" / "metrics.jsonl").exists()

    def test_a_metric_that_none_of_the_functions_gives(self, place, module):
        module.f = lambda prompts, completions, references: {"precision": 1.0, "recall": 0.5}
        with pytest.raises(UserError, match=r"evaluation\.metric: 'evaluation/precison' is not measured; what is measured: .*Did you mean 'evaluation/precision'\?"):
            run("sft", config(place, "fault", {"max_steps": 2}, own() | {"metric": "evaluation/precison", "mode": "max"}))

    def test_a_row_without_a_reference(self, place):
        rows = [json.loads(line) for line in (place / "sft.jsonl").read_text().splitlines()]
        broken = write_rows(place / "broken.jsonl", [row | ({"completion": "  "} if n == 7 else {}) for n, row in enumerate(rows)])
        with pytest.raises(UserError, match=r"broken\.jsonl:8"):
            run("sft", config(place, "fault", {"max_steps": 2}, data=str(broken)))

    @pytest.mark.parametrize(
        ("evaluation", "changes", "message"),
        [
            (EVALUATED, {"split": {"validation": 0.0}}, "evaluation.metrics needs validation rows"),
            ({"metric": "evaluation/perplexity"}, {"split": {"validation": 0.0}}, "evaluation.metric needs validation rows"),
            (EVALUATED | {"generate": {"max_new_tokens": 512}}, {}, "generate.max_new_tokens 512: no validation prompt leaves room"),
            (EVALUATED | {"metric": "evaluation/loss"}, {"train": {"save_every": 2, "eval_every": 3, "batch_size": 8}}, "with evaluation.metric they must be equal"),
        ],
    )
    def test_settings_that_cannot_work(self, place, evaluation, changes, message):
        with pytest.raises(UserError, match=message):
            run("sft", config(place, "fault", None, evaluation) | changes)
