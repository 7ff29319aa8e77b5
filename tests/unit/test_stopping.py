"""When a run has stopped improving: hand-worked histories, and the rule that a config comes to."""

import math

import pytest

from configs.schema import RewardStage, SFTStage
from stages.training.stopping import Rule, rule_of, stopped_early, waited

SFT = {"name": "x", "init_from": "base", "data": "d.jsonl"}


@pytest.mark.parametrize(
    ("values", "higher", "least", "expected"),
    [
        ([], False, 0.0, 0),
        ([3.0], False, 0.0, 0),
        ([3.0, 2.0, 1.0], False, 0.0, 0),
        ([1.0, 2.0, 3.0], False, 0.0, 2),
        ([1.0, 1.0, 1.0], False, 0.0, 2),  # an equal value is no improvement
        ([1.0, 2.0, 3.0], True, 0.0, 0),
        ([3.0, 2.95, 2.8, 2.75, 2.71], False, 0.1, 2),  # 2.95 lacks 0.05; 2.8 counts; 2.75 and 2.71 gain less than 0.1 on 2.8
        ([0.5, 0.625, 0.75, 0.875], True, 0.25, 0),  # small steps add up: 0.875 is 3/8 above 0.5, the last that counted
        ([0.5, 0.625, 0.75, 0.75], True, 0.25, 3),
        ([0.25, 0.5], True, 0.25, 1),  # more than, not as much as
        ([math.nan, math.nan], False, 0.0, 1),
        ([math.nan, 2.0, math.nan, 1.0], False, 0.0, 0),  # a NaN is no improvement and no value to be better than
    ],
)
def test_evaluations_since_the_last_improvement(values, higher, least, expected):
    assert waited(values, higher=higher, min_improvement=least) == expected


def test_a_history_stops_a_run_at_the_evaluation_that_exhausts_its_patience():
    rule = Rule("evaluation/rougeL", True, patience=2, min_improvement=0.02)
    history = [{"loss": 1.0}, *({"eval_loss": 1.0, "eval_rougeL": value} for value in (0.30, 0.40, 0.41, 0.419))]
    # 0.40 counts; 0.41 and 0.419 are not more than 0.02 above it: two evaluations have passed at the last entry, and at none before.
    assert [stopped_early(history[:end], rule) for end in range(1, 6)] == [False, False, False, False, True]
    assert not stopped_early(history, rule._replace(patience=None))
    assert not stopped_early(history, None)


def test_evaluations_that_do_not_measure_the_metric_are_not_counted():
    rule = Rule("evaluation/rougeL", True, patience=1)
    history = [{"eval_rougeL": 0.5}, {"eval_loss": 1.0}, {"eval_loss": 2.0}]
    assert not stopped_early(history, rule)
    assert stopped_early([*history, {"eval_rougeL": 0.4}], rule)


def test_the_short_form_is_the_same_rule():
    short = rule_of(SFTStage.model_validate(SFT | {"train": {"early_stopping_patience": 3}}))
    long = rule_of(SFTStage.model_validate(SFT | {"evaluation": {"early_stopping": {"patience": 3}}}))
    assert short is not None
    assert long is not None
    assert short._replace(setting="") == long._replace(setting="") == Rule("evaluation/loss", False, 3, 0.0, "")
    assert rule_of(RewardStage.model_validate(SFT | {"train": {"early_stopping_patience": 3}})) == short
    assert rule_of(SFTStage.model_validate(SFT)) is None


def test_a_metric_without_early_stopping_chooses_and_never_stops():
    rule = rule_of(SFTStage.model_validate(SFT | {"evaluation": {"metric": "evaluation/token_accuracy"}}))
    assert rule == Rule("evaluation/token_accuracy", True, None, 0.0, "evaluation.metric")
    assert rule.key == "eval_token_accuracy"
