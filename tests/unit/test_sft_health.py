"""SFT's health checks on histories made by hand: at the limit, beyond it, over a window; when they are news."""

from __future__ import annotations

import re
from typing import get_args

import pytest

from configs.schema import SFTHealth, SFTStage, SFTTrain
from configs.schema.health import SFTCheckName
from stages.health.findings import counts, findings
from stages.training import health
from stages.training.health import CHANGED, DROP, DROPPED, DUPLICATES, PERPLEXITY, SKIPPED, START


def course(warmup_steps=0, **limits):
    return health.Course(SFTHealth(**limits), warmup_steps)


def names(history, warmup_steps=0, **limits):
    """What fails in the newest line."""
    asked = course(warmup_steps, **limits)
    return [finding.name for finding in findings(health.CHECKS, history, asked.limits, asked)]


def training(losses, every=10, norm=1.0, **more):
    """Training logs, one every so many steps."""
    return [{"step": every * i, "loss": loss, "grad_norm": norm, **more} for i, loss in enumerate(losses, 1)]


def falling(count):
    """A loss that falls from 3 by a tenth of what is left."""
    return [1 + 2 * 0.9**i for i in range(count)]


def merged(*lines):
    """Lines in the order of their steps; of one step, training logs first, as the Trainer writes them."""
    return sorted((line for part in lines for line in part), key=lambda line: (line["step"], "eval_loss" in line))


def test_every_check_has_the_name_of_a_config_value_and_words():
    assert [check.name for check in health.CHECKS] == list(get_args(SFTCheckName))
    assert all(check.seen.__name__ == check.name for check in health.CHECKS)
    assert all(check.cause and check.remedy for check in health.CHECKS)


def test_remedies_name_fields_that_exist():
    sections = {"train": SFTTrain, "health": SFTHealth}
    for check in health.CHECKS:
        for section, field in re.findall(r"\b(train|health)\.(\w+)", check.remedy):
            assert field in sections[section].model_fields, f"{check.name}: {section}.{field}"
        for word in re.findall(r"(?<![./\w])([a-z]+_[a-z_]+)\b(?!\.)", check.remedy):
            assert word in SFTStage.model_fields, f"{check.name}: {word}"


def test_a_run_that_is_well_has_no_findings_at_any_line():
    lines = merged(training(falling(60)), [{"step": 50 * i, "eval_loss": 1.05 + 2 * 0.9 ** (5 * i)} for i in range(1, 13)])
    assert all(names(lines[:end]) == [] for end in range(1, len(lines) + 1))


# -- overfitting


def evaluated(losses, trained=(2.0, 1.5, 1.0, 0.5, 0.4)):
    """An evaluation every 10 steps, and a training log at each."""
    return merged(training(trained[: len(losses)]), [{"step": 10 * i, "eval_loss": loss} for i, loss in enumerate(losses, 1)])


def test_overfitting_is_a_validation_loss_above_its_lowest_three_times_while_the_training_loss_falls():
    assert names(evaluated([2.0, 2.1, 2.3, 2.2])) == ["overfitting"]
    assert names(evaluated([2.0, 2.1, 2.2])) == [], "two evaluations"
    assert names(evaluated([2.0, 2.1, 1.99, 2.3])) == [], "a new lowest in between"
    assert names(evaluated([2.0, 2.1, 2.03, 2.3])) == [], "within 2 % of the lowest in between"
    assert names(evaluated([2.0, 2.1, 2.2, 2.3], trained=(0.5, 1.0, 1.5, 2.0))) == [], "the training loss rises too: that is another illness"
    assert names(evaluated([2.0, 2.1, 2.2]), rising_evaluations=2) == ["overfitting"]
    assert names(evaluated([2.0, 2.1, 2.03, 2.3]), min_rise=0.01) == ["overfitting"]


def test_overfitting_needs_a_gap():
    # The newest training loss is .5: 2.3 - .5 = 1.8 nats.
    lines = evaluated([2.0, 2.1, 2.2, 2.3])
    assert names(lines, max_gap=1.81) == []
    assert names(lines, max_gap=1.79) == ["overfitting"]
    found = health.judged(lines[-1], lines[:-1], course())[1][0]
    assert "lowest at step 10 with 2 and is 2.3, 3 evaluations in a row above it, while the training loss fell 2 -> 0.5; they are 1.8 nats apart" in found.seen


def test_the_task_is_what_overfits_where_general_text_is_mixed_in():
    """What is optimised rises, of which the task's loss is a part."""
    lines = evaluated([2.0, 2.1, 2.2, 2.3])
    for line, objective in zip([line for line in lines if "loss" in line], (5.0, 5.1, 5.2, 5.3), strict=True):
        line["objective"] = objective
    assert names(lines) == ["overfitting"]


# -- forgetting


def test_forgetting_is_perplexity_against_the_start():
    start = {"step": 0, PERPLEXITY: 4.0, START: 1.0}
    assert names([start]) == []
    assert names([start, {"step": 10, PERPLEXITY: 6.0}]) == [], "1.5 times is the limit"
    assert names([start, {"step": 10, PERPLEXITY: 6.01}]) == ["forgetting"]
    assert names([start, {"step": 10, PERPLEXITY: 6.01}], max_perplexity_growth=2) == []
    assert names([start, {"step": 10, PERPLEXITY: float("nan")}]) == ["forgetting"]
    later = {"step": 20, PERPLEXITY: 6.01, START: 1.0}  # another text from here on
    assert names([start, later, {"step": 30, PERPLEXITY: 6.1}]) == []


def test_forgetting_is_what_the_old_answers_lose_and_tells_how_many_have_changed():
    lines = [{"step": 0, DROP: 0.0, CHANGED: 0.0, START: 1.0}, {"step": 10, DROP: 1.01, CHANGED: 0.75}]
    assert names(lines) == ["forgetting"]
    assert "lost 1.01 nats per token, limit 1; 75% of them" in health.judged(lines[-1], lines[:-1], course())[1][0].seen
    assert names([lines[0], {"step": 10, DROP: 0.99, CHANGED: 1.0}]) == []


# -- leakage


def test_a_training_loss_near_0_from_the_start():
    assert names(training([0.04])) == ["leakage_like_loss"]
    assert names(training([0.06])) == []
    assert names(training([0.06, 0.04])) == [], "it was learned"
    assert names(training([0.04], every=60)) == [], "60 steps may have learned it"


def test_a_validation_loss_far_below_the_training_loss_after_it():
    """At step 20 validation had .9; training had 2.0 from there to step 40: .45 of it."""
    lines = merged(training([2.1, 2.0, 2.0, 2.0]), [{"step": 20, "eval_loss": 0.9}, {"step": 40, "eval_loss": 0.95}])
    assert names(lines[:3]) == [], "the training loss after it is not known yet"
    assert names(lines) == ["leakage_like_loss"]
    assert names(lines, min_validation_share=0.4) == []


def test_validation_rows_among_the_training_rows():
    assert names([{"step": 0, DROPPED: 0.0, DUPLICATES: 0.05}]) == []
    assert names([{"step": 0, DROPPED: 0.0, DUPLICATES: 0.06}]) == ["leakage_like_loss"]


def test_dropped_rows():
    assert names([{"step": 0, DROPPED: 0.1}]) == []
    assert names([{"step": 0, DROPPED: 0.11}]) == ["dropped_rows"]


# -- flat


def test_flat_loss_is_no_fall_beyond_the_noise():
    # Logs of 10 steps: five at either end, so from step 100 on.
    noisy = [2.1, 1.9] * 10
    assert names(training(noisy[:9])) == [], "nine logs have no two ends"
    assert names(training(noisy[:10])) == ["flat_loss"]
    assert names(training([*[3.0] * 5, *[2.0] * 5])) == []
    # Successive differences of .2: the variance of a log is .02, of the difference of two means of five 2 * .02 / 5, twice its root .179.
    def shifted(by):
        return [2.1, 1.9, 2.1, 1.9, 2.1, *(x - by for x in (2.1, 1.9, 2.1, 1.9, 2.1))]

    assert names(training(shifted(0.17))) == ["flat_loss"]
    assert names(training(shifted(0.19))) == []


def test_a_steep_fall_at_the_start_is_no_noise():
    assert names(training([4.55, 2.7, 2.18, 1.99, 1.86, 1.75, 1.67, 1.66, 1.64, 1.63])) == []


def test_flat_loss_waits_for_the_warm_up_and_compares_with_the_very_start():
    flat = training([2.1, 1.9] * 10)
    assert names(flat, warmup_steps=151) == [], "200 < 151 + 50"
    assert names(flat, warmup_steps=150) == ["flat_loss"]
    fell_early = training([3.0, 2.8, 2.6, 2.4, 2.2, *[2.1, 1.9] * 20])
    assert names(fell_early) == [], "that it is flat now is convergence"


def test_single_steps_are_pooled():
    """With a log at every step the ends are a quarter of flat_steps, 13 logs (steps 1 to 13.5), so 26 are needed and 50 steps."""
    lines = training([2.1, 1.9] * 30, every=1)
    assert names(lines[:49]) == []
    assert names(lines[:50]) == ["flat_loss"]


# -- too high


def test_a_loss_that_rises_above_its_lowest():
    # Lowest five of 1, start 2: the limit is 1 + .2 * 2 = 1.4.
    down = [2.0] * 5 + [1.0] * 5
    assert names(training([*down, *[1.39] * 5])) == []
    assert names(training([*down, *[1.41] * 5])) == ["learning_rate_too_high"]
    assert names(training([*down, *[1.41] * 5]), max_loss_rise=0.3) == []
    assert names(training([*down, *[1.41] * 4])) == [], "(4 * 1.41 + 1) / 5 = 1.33"


def test_a_rise_within_the_noise_is_none():
    # Newest differences of 2, 2, 2, 1: the variance is 13 / 8, three errors are 3 * sqrt(1.625 * .4) = 2.4; the rise 1.7 - .7.
    wild = [2.0] * 5 + [1.7, 0.0, 1.7, 0.0, 0.1] + [2.7, 0.7, 2.7, 0.7, 1.7]
    assert "learning_rate_too_high" not in names(training(wild))


def test_a_rate_that_is_far_too_high_has_undone_everything_before_the_second_log():
    assert names(training([1.0, *[6.0, 5.9] * 5])) == ["flat_loss", "learning_rate_too_high"]
    assert names(training([6.0, *[6.0, 5.9] * 5])) == ["flat_loss"]


def test_gradients_that_grow():
    lines = training([2.0] * 5 + [1.0] * 5)
    for line in lines[-5:]:
        line["grad_norm"] = 10.0
    assert names(lines) == []
    for line in lines[-3:]:
        line["grad_norm"] = 10.1
    assert names(lines) == ["learning_rate_too_high"], "the median of five"


def test_skipped_steps():
    assert names(training([2.0], **{SKIPPED: 1})) == [], "one is an accident"
    assert names(training([2.0], **{SKIPPED: 2})) == ["learning_rate_too_high"]
    assert names([{"step": 100, "loss": 2.0, SKIPPED: 2}]) == [], "2 % is the limit"


# -- what is made of findings


def test_a_check_is_news_at_the_first_line_it_fails_in_and_not_at_the_next_that_it_can_fail_in():
    lines, news = [], []
    for line in evaluated([2.0, 2.1, 2.2, 2.3, 2.4]):
        marked, started = health.judged(line, lines, course())
        lines.append(marked)
        news += [(finding.name, line["step"]) for finding in started]
    assert news == [("overfitting", 40)], "training logs in between are no recovery"
    assert counts(lines) == {"overfitting": 2}


@pytest.mark.parametrize("limits", [{"action": "off"}, {"ignore": ["dropped_rows"]}])
def test_off_and_ignore(limits):
    assert names([{"step": 0, DROPPED: 0.5}], **limits) == []
