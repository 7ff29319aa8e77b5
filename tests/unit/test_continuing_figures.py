"""Before and after: the arithmetic, and what is made of it."""

from __future__ import annotations

import numpy as np
import pytest

from stages.continuing.figures import BETTER, NEITHER, WORSE, Sums, by_group, compare, paired, ratio_and_se, verdict
from stages.continuing.row_sums import RowSums, interval, mean, of_completions, of_labels, values
from stages.continuing.table import lines
from stages.validation.text_metrics import COMPARE, classified


def test_every_token_counts_alike_and_errors_are_of_prompts():
    """Sums 2 and 6 over 1 and 3 tokens: 8/4 = 2, and both prompts lie on it, so no error. With 4 and 4: 2 again, and errors of
    4 - 2·1 = 2 and 4 - 2·3 = -2: se² = 2/1 · (4 + 4) / 16 = 1."""
    assert ratio_and_se(np.array([2.0, 6.0]), np.array([1.0, 3.0])) == (2.0, 0.0)
    assert ratio_and_se(np.array([4.0, 4.0]), np.array([1.0, 3.0])) == (2.0, pytest.approx(1.0))
    assert ratio_and_se(np.array([4.0]), np.array([2.0])) == (2.0, None)


def test_one_token_per_prompt_is_the_usual_standard_error():
    values = np.random.default_rng(0).normal(size=50)
    assert ratio_and_se(values, np.ones(50))[1] == pytest.approx(values.std(ddof=1) / 50**0.5)


def test_the_interval_is_of_the_difference_and_not_of_either():
    """Losses that differ much between prompts and by the same 0.1 before and after: a paired interval is a point."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(1, 20, 40).astype(float)
    before = tokens * rng.uniform(1, 5, 40)
    found = paired(before, before - 0.1 * tokens, tokens, seed=0)
    assert found.before_se > 0.1
    assert (found.difference, found.low, found.high) == (pytest.approx(-0.1), pytest.approx(-0.1), pytest.approx(-0.1))
    assert verdict(found.low, found.high) == BETTER
    worse = paired(before - 0.1 * tokens, before, tokens, seed=0)
    assert verdict(worse.low, worse.high) == WORSE
    assert verdict(worse.low, worse.high, higher=True) == BETTER


def test_the_interval_holds_the_truth_about_as_often_as_it_says():
    rng, held = np.random.default_rng(2), 0
    for _ in range(300):
        tokens = rng.integers(1, 12, 25).astype(float)
        change = rng.normal(0.05, 0.2, 25) * tokens
        before = rng.uniform(1, 3, 25) * tokens
        found = paired(before, before + change, tokens, seed=int(rng.integers(1 << 30)), resamples=500)
        held += found.low <= 0.05 <= found.high
    assert 0.90 <= held / 300 <= 0.985


def test_noise_and_a_single_prompt_are_no_verdict():
    rng = np.random.default_rng(3)
    tokens = np.full(30, 5.0)
    before = rng.normal(10, 3, 30)
    noise = paired(before, before + rng.normal(0, 1, 30), tokens, seed=0)
    assert verdict(noise.low, noise.high) == NEITHER
    one = compare(*(Sums(np.array([value]), np.zeros(1), np.ones(1)) for value in (3.0, 1.0)), [0], seed=0)
    assert one["verdict"] == "no interval: one prompt only"


def test_windows_of_one_text_are_no_sample_of_texts():
    """Twenty windows of one text that all got better: no interval. Of two texts, the interval is that of two units."""
    loss = np.full(20, 5.0)
    before, after = (Sums(loss - change, np.zeros(20), np.ones(20)) for change in (0, 1))
    one = compare(before, after, [0] * 20, seed=0, unit="text")
    assert (one["rows"], one["texts"], one["loss"]["low"], one["verdict"]) == (20, 1, None, "no interval: one text only")
    assert compare(before, after, [0, 1] * 10, seed=0, unit="text")["texts"] == 2
    shown = lines({"of": "sft/a@1", "adapter": "same", "sets": [{"name": "plain text", **one}]})[2]
    assert shown.startswith("plain text (20 windows of 1 text)")
    assert "[" not in shown


def test_rows_of_one_prompt_are_one_unit():
    """Each row twice: the same figures and the same interval as once, which rows taken for independent would halve."""
    rng = np.random.default_rng(4)
    tokens, loss = rng.integers(1, 9, 20).astype(float), rng.uniform(1, 9, 20)
    before, after = Sums(loss, np.zeros(20), tokens), Sums(loss + rng.normal(0, 1, 20), np.ones(20), tokens)
    once = compare(before, after, list(range(20)), seed=5)
    twice = compare(Sums(*(np.repeat(x, 2) for x in before)), Sums(*(np.repeat(x, 2) for x in after)), [i // 2 for i in range(40)], seed=5)
    assert (twice["rows"], twice["prompts"]) == (40, 20)
    assert twice["loss"] == pytest.approx(once["loss"])
    assert once["token_accuracy"]["difference"] == pytest.approx(20 / tokens.sum())


def test_the_table_says_it():
    rng = np.random.default_rng(6)
    sums = Sums(rng.uniform(1, 2, 8), np.zeros(8), np.ones(8))
    found = compare(sums, Sums(sums.loss - 0.5, sums.correct, sums.tokens), list(range(8)), seed=0)
    shown = lines({"of": "sft/a@1", "adapter": "same", "sets": [{"name": "new data", **found, "note": "changed files"}], "notes": ["a note"]})
    assert shown[0].startswith("trained on from sft/a@1 (an adapter is the same one, trained on)")
    assert "-0.5000 [-0.5000, -0.5000]" in shown[2]
    assert shown[2].endswith("better")
    assert shown[3:] == ["new data: changed files", "a note"]


COMPLETIONS = ["a small red fox ran", "the cat sat on the mat", "no", "it rains in the old town today"]
REFERENCES = ["a small fox ran home", "the cat sat on the mat", "yes", "it rained in the old town"]


def test_sums_over_rows_come_to_what_the_metrics_say():
    """BLEU, chrF, ROUGE and exact match from sums are those from texts; two of four rows doubled are those of six rows."""
    names = list(COMPARE)
    found = of_completions(names, COMPLETIONS, REFERENCES)
    expected = {key: value for name in names for key, value in COMPARE[name](COMPLETIONS, REFERENCES).items()}
    assert values(found) == pytest.approx(expected)
    again = {key: value for name in names for key, value in COMPARE[name](COMPLETIONS + COMPLETIONS[:2], REFERENCES + REFERENCES[:2]).items()}
    assert {name: one.figure(np.array([2, 2, 1, 1]) @ one.rows) for name, one in found.items()} == pytest.approx(again)


def test_label_sums_are_accuracy_and_macro_f1():
    predicted, truth, labels = [0, 1, 1, 2, 0], [0, 1, 0, None, 2], ["a", "b", "c"]
    expected = classified([labels[number] for number in predicted], ["" if number is None else labels[number] for number in truth])
    assert values(of_labels(predicted, truth, 3)) == pytest.approx(expected)


def test_the_interval_of_a_mean_is_that_of_the_table():
    rng = np.random.default_rng(8)
    before, after, groups = rng.uniform(0, 1, 40), rng.uniform(0, 1, 40), [row // 2 for row in range(40)]
    low, high = interval(*(RowSums(np.stack([x, np.ones(40)], axis=1), mean) for x in (before, after)), groups, seed=0, resamples=10_000)
    same = paired(*(by_group(x, groups) for x in (before, after, np.ones(40))), seed=0)
    assert (low, high) == (pytest.approx(same.low, abs=0.01), pytest.approx(same.high, abs=0.01))
    assert interval(RowSums(np.ones((3, 2)), mean), RowSums(np.ones((3, 2)), mean), [7, 7, 7], seed=0) is None
