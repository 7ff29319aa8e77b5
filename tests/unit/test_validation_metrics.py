"""Metrics of completions against references: numbers worked out by hand, and what is said of functions that misbehave."""

import math
import sys
import types

import pytest

from configs import extras
from configs.errors import MissingExtra, UserError
from configs.schema.validation import PythonMetric
from stages.validation import own, text_metrics
from stages.validation.held_out import perplexity

MINE, THEIRS = "the cat is on the mat", "the cat sat on the mat"


def test_exact_match_is_blind_to_case_width_and_spaces_and_to_nothing_else():
    assert text_metrics.exact_match(["  YES\n", "ﬁne  day", "no."], ["yes", "fine day", "no"]) == {"exact_match": pytest.approx(2 / 3)}


def test_bleu_by_hand():
    """Of 6, 5, 4, 3 n-grams 5, 3, 1, 0 match; sacrebleu puts 1/2 for the first 0: (5/6 · 3/5 · 1/4 · 1/6)^(1/4) = 0.3799."""
    assert text_metrics.bleu([MINE], [THEIRS])["bleu"] == pytest.approx(100 * (5 / 6 * 3 / 5 * 1 / 4 * 1 / 6) ** 0.25)
    assert text_metrics.bleu([THEIRS, MINE], [THEIRS, MINE])["bleu"] == pytest.approx(100)


def test_bleu_is_of_the_corpus_and_not_a_mean_of_rows():
    """A short completion costs exp(1 - reference / completion) of the corpus' words: 6 of 12 reference words written, all of them right."""
    found = text_metrics.bleu([THEIRS, ""], [THEIRS, THEIRS])["bleu"]
    assert found == pytest.approx(100 * math.exp(1 - 12 / 6))


def test_chrf_by_hand():
    """Of "ab" against "ac": 1 of 2 characters, 0 of 1 pairs, and no longer n-grams: F2 of (1/2 + 0) / 2 twice is 0.25."""
    assert text_metrics.chrf(["ab"], ["ac"])["chrf"] == pytest.approx(25)
    assert text_metrics.chrf([THEIRS], [THEIRS])["chrf"] == pytest.approx(100)


def test_rouge_by_hand_and_as_a_mean_over_rows():
    """5 of 6 words, 3 of 5 pairs, a common subsequence of 5 of 6; the second row has nothing in common."""
    assert text_metrics.rouge([MINE], [THEIRS]) == {"rouge1": pytest.approx(5 / 6), "rouge2": pytest.approx(3 / 5), "rougeL": pytest.approx(5 / 6)}
    assert text_metrics.rouge([MINE, "no"], [THEIRS, "yes"])["rouge1"] == pytest.approx(5 / 12)


def test_accuracy_and_macro_f1_by_hand():
    """a: 2 right, 1 missed, 1 told for c: F1 4/6. b: 1 right, 1 told for a: 2/3. c is missed: 0. A blank reference is always wrong."""
    found = text_metrics.classified(["a", "a", "b", "b", "a"], ["a", "a", "a", "b", "c"])
    assert found["accuracy"] == pytest.approx(3 / 5)
    assert found["macro_f1"] == pytest.approx((4 / 6 + 2 / 3 + 0) / 3)
    assert text_metrics.classified(["a", "a"], ["a", ""]) == {"accuracy": 0.5, "macro_f1": pytest.approx(2 / 3)}


def test_perplexity_of_a_loss_beyond_floats_is_infinite():
    assert perplexity(math.log(8)) == pytest.approx(8)
    assert perplexity(1e6) == math.inf
    assert math.isnan(perplexity(math.nan))


@pytest.mark.parametrize("name", ["bleu", "chrf", "rouge"])
def test_a_missing_package_names_the_extra(monkeypatch, name):
    monkeypatch.setattr(extras, "find_spec", lambda package: None)
    with pytest.raises(MissingExtra, match=rf"evaluation\.metrics: {name} needs .*pip install 'align-stack\[metrics\]'"):
        extras.need(text_metrics.PACKAGES[name], f"evaluation.metrics: {name}", text_metrics.EXTRA)


def test_the_packages_are_what_the_extra_brings():
    assert all(extras.find_spec(package) for package in text_metrics.PACKAGES.values())


@pytest.fixture
def module(monkeypatch):
    """A module that functions can be put into, under the name own_metrics."""
    made = types.ModuleType("own_metrics")
    monkeypatch.setitem(sys.modules, "own_metrics", made)
    return made


def call(module, function, columns=None):
    module.f = function
    metric = own.OwnMetric(PythonMetric(kind="python", function="own_metrics:f"))
    return metric(["p", "q"], ["a", "b"], ["a", "c"], columns or {})


def test_a_function_gives_a_number_or_numbers_by_name(module):
    import numpy
    import torch

    assert call(module, lambda prompts, completions, references: 0.5) == {"f": 0.5}
    assert call(module, lambda prompts, completions, references, level: {"f1": 1, "mean-level": numpy.mean(level)}, {"level": [1, 3]}) == {"f1": 1.0, "mean-level": 2.0}
    assert call(module, lambda **lists: torch.tensor(float(lists["completions"] == ["a", "b"]))) == {"f": 1.0}


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (math.nan, "metric own_metrics:f: returned nan; expected a finite number"),
        ({"f1": math.inf}, "metric own_metrics:f: f1 is inf; expected a finite number"),
        ([0.5, 0.5, 0.5], "metric own_metrics:f: returned a list of 3; expected one number for all rows together"),
        (None, "metric own_metrics:f: returned a NoneType; expected one number"),
        ("0.5", "metric own_metrics:f: returned a str of 3"),
        (True, "metric own_metrics:f: returned a bool"),
        ({}, "returned an empty mapping"),
        ({"loss": 1.0}, "names a metric 'loss', which is one of ours"),
        ({"a b": 1.0}, "names a metric 'a b'; expected a name of letters"),
    ],
)
def test_what_is_no_finite_number_is_told_with_the_functions_name(module, returned, message):
    with pytest.raises(UserError, match=message):
        call(module, lambda prompts, completions, references: returned)


def test_a_function_that_fails_is_told_with_the_row_and_the_line(module):
    def fails(prompts, completions, references):
        if "b" in completions:
            raise KeyError("rank")
        return 0.0

    with pytest.raises(UserError, match=r"metric own_metrics:f: failed on prompt 1 of 2: KeyError: 'rank' \(.*test_validation_metrics\.py:\d+, in fails\); correct the function"):
        call(module, fails)


def test_a_function_of_another_shape_is_refused_before_it_is_called(module):
    with pytest.raises(UserError, match=r"the function takes \(completions, references\); expected f\(prompts, completions, references, \*\*columns\) -> float or dict"):
        call(module, lambda completions, references: 1.0)
    with pytest.raises(UserError, match="needs the column level"):
        call(module, lambda prompts, completions, references, level: 1.0)
    with pytest.raises(UserError, match="metric nowhere_at_all:f: there is no module 'nowhere_at_all'"):
        own.OwnMetric(PythonMetric(kind="python", function="nowhere_at_all:f"))


def test_of_the_logits_only_those_that_labels_are_read_from_are_made():
    """Three rows with prompts of 5, 9 and 40 tokens and labels of 1 and 3: log-probs are those of a plain forward pass, one row at a time."""
    import torch
    from accelerate import Accelerator
    from transformers import AutoModelForCausalLM

    from stages.validation.labels import Choice, label_logprobs
    from tests.tiny import tiny_config

    torch.manual_seed(0)
    model, shapes = AutoModelForCausalLM.from_config(tiny_config()).eval(), []
    model.register_forward_hook(lambda module, args, output: shapes.append(output.logits.shape))
    labels = [[7], [8, 9, 7]]
    rows = [Choice(list(range(10, 10 + length)), labels, 0) for length in (5, 9, 40)]
    trainer = types.SimpleNamespace(accelerator=Accelerator(cpu=True), model=model, is_deepspeed_enabled=False, args=types.SimpleNamespace(per_device_eval_batch_size=4))
    found = label_logprobs(trainer, rows, 0)
    assert max(shape[1] for shape in shapes) <= 8, "4 rows with at most 8 positions of labels among them, of 43"
    shapes.clear()
    for row, told in zip(rows, found, strict=True):
        for label, value in zip(labels, told.tolist(), strict=True):
            with torch.no_grad():
                logprobs = model(torch.tensor([row.prompt_ids + label])).logits[0].log_softmax(-1)
            places = range(len(row.prompt_ids) - 1, len(row.prompt_ids) + len(label) - 1)
            assert value == pytest.approx(sum(logprobs[place, token].item() for place, token in zip(places, label, strict=True)), rel=1e-5)
