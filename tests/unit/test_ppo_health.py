"""Health checks on histories made by hand: at the limit, beyond it, over a trend; what is printed, counted and ignored."""

from __future__ import annotations

from typing import get_args

import pytest

from configs.errors import UserError
from configs.schema import Health
from configs.schema.health import CheckName
from stages.ppo import health
from tests.unit.ppo_samples import config

WELL = {
    "objective/score": 0.5, "objective/score_se": 0.1, "objective/score_clipped": 0.0, "objective/kl": 1.0, "objective/kl_se": 0.1,
    "policy/entropy": 2.0, "policy/max_ratio": 1.5, "policy/first_approx_kl": 0.0, "policy/first_ratio": 1.0, "policy/clip_fraction": 0.1,
    "policy/skipped_steps": 0, "value/explained_variance": 0.5, "value/clip_fraction": 0.1, "rollout/length": 20.0, "rollout/eos_rate": 0.9,
    "rollout/short_completions": 0.0, "rollout/sampler_gap": 1e-5,
}  # fmt: skip


def history(*changes):
    """Lines that are well but for the changes."""
    return [WELL | change for change in changes]


def names(lines, cfg=None):
    return [finding.name for finding in health.findings(lines, cfg or config())]


def test_every_check_has_the_name_of_a_config_value_and_words():
    assert [check.name for check in health.CHECKS] == list(get_args(CheckName))
    assert all(check.seen.__name__ == check.name for check in health.CHECKS)
    assert all(check.cause and check.remedy for check in health.CHECKS)


def test_remedies_name_fields_that_exist():
    """Every dotted or underscored word of a remedy that looks like a field is one."""
    import re

    from configs.schema import AdaptiveKL, PPOStage, PPOTrain, Sampling
    from configs.schema.engines import RolloutEngine

    sections = {"train": PPOTrain, "sampling": Sampling, "health": Health, "adaptive_kl": AdaptiveKL, "engine": RolloutEngine}
    metrics = {key.split("/")[1] for key in WELL}
    for check in health.CHECKS:
        for section, field in re.findall(r"\b(train|sampling|health|adaptive_kl|engine)\.(\w+)", check.remedy):
            assert field in sections[section].model_fields, f"{check.name}: {section}.{field}"
        for word in re.findall(r"(?<![./\w])([a-z]+_[a-z_]+)\b(?!\.)", check.remedy):
            assert word in PPOStage.model_fields or word in metrics or word in PPOTrain.model_fields, f"{check.name}: {word}"


def test_a_run_that_is_well_has_no_findings():
    assert names(history(*[{}] * 20)) == []


@pytest.mark.parametrize(
    ("name", "key", "limit"),
    [
        ("ratio_explosion", "policy/max_ratio", 10.0), ("clip_fraction", "policy/clip_fraction", 0.4), ("first_step", "policy/first_approx_kl", 0.01),
        ("short_completions", "rollout/short_completions", 0.25), ("value_clip", "value/clip_fraction", 0.5), ("score_clipped", "objective/score_clipped", 0.2),
        ("sampler_gap", "rollout/sampler_gap", 0.5), ("skipped_steps", "policy/skipped_steps", 0),
    ],
)  # fmt: skip
def test_limits_of_a_single_iteration(name, key, limit):
    assert names(history({key: limit})) == []
    assert names(history({key: limit + 0.001})) == [name]
    assert names(history({key: limit + 0.001}, {})) == [], "what is over is over"


@pytest.mark.parametrize(
    ("field", "key", "value"), [("max_ratio", "policy/max_ratio", 3.0), ("max_clip_fraction", "policy/clip_fraction", 0.2), ("max_sampler_gap", "rollout/sampler_gap", 0.01)]
)
def test_limits_are_the_configs(field, key, value):
    assert len(names(history({key: value + 0.001}), config(health={field: value}))) == 1
    assert names(history({key: value + 0.001}), config()) == []


def test_negative_kl_beyond_its_standard_error():
    # One iteration: 5 standard errors (and .001 nats of rounding). -.51 ± .1 is beyond, -.49 is not; at the reference it is 0 ± 0.
    assert names(history({"objective/kl": -0.51})) == ["negative_kl"]
    assert names(history({"objective/kl": -0.49})) == []
    assert names(history({"objective/kl": 0.0, "objective/kl_se": 0.0}, {"objective/kl": -0.0005, "objective/kl_se": 0.0})) == []
    # Four iterations of -.2 ± .1: pooled error sqrt(4 * .01) / 4 = .05, so -.2 is 4 of them; two are -.2 ± .0707, 2.8 of them.
    below = {"objective/kl": -0.2}
    assert names(history({}, below)) == []
    assert names(history(below, below)) == []
    assert names(history(below, below, below, below)) == ["negative_kl"]
    assert "of the last 4 iterations -0.2000 ± 0.0500" in health.findings(history(*[below] * 4), config())[0].seen


def test_entropy_is_compared_with_the_first_iterations():
    assert names(history({}, {"policy/entropy": 0.21})) == []
    assert names(history({}, {"policy/entropy": 0.19})) == ["entropy_collapse"]
    assert names(history({"policy/entropy": 0.19})) == [], "a policy that starts so has not collapsed"
    assert names(history({}, {"policy/entropy": 0.19}), config(health={"min_entropy_share": 0.05})) == []


def test_no_eos_needs_32_completions_and_matters_only_where_one_may_end():
    none = {"rollout/eos_rate": 0.0}
    small = {"rollout_batch_size": 16}
    assert names(history(none)) == ["no_eos"]
    assert names(history(none), config(train=small)) == []
    assert names(history(none, none), config(train=small)) == ["no_eos"]
    assert names(history({}, none), config(train=small)) == []
    assert names(history(none), config(sampling={"stop_at_eos": False})) == []


def test_length_drift_compares_the_last_iterations_with_the_first():
    # The means of up to four at either end: 20 -> 41 is more than twice, 20 -> 9.9 less than half.
    at = lambda length: {"rollout/length": length}  # noqa: E731
    assert names(history(at(20), at(41))) == ["length_drift"]
    assert names(history(at(20), at(39))) == []
    assert names(history(at(20), at(9.9))) == ["length_drift"]
    assert names(history(at(20), at(0))) == ["length_drift"]
    assert names(history(*[at(20)] * 7, at(50))) == [], "(20 + 20 + 20 + 50) / 4 = 27.5"
    assert names(history(*[at(20)] * 4, *[at(41)] * 4)) == ["length_drift"]
    assert names(history(at(20), at(41)), config(health={"max_length_factor": 3})) == []


def test_explained_variance_is_judged_after_warm_up_and_grace():
    # 2 of warm-up, 3 of grace, then a mean over 4.
    cfg = config(train={"value_warmup_iterations": 2}, health={"grace_iterations": 3})
    below = {"value/explained_variance": -0.1}
    assert names(history(*[below] * 8), cfg) == []
    assert names(history(*[below] * 9), cfg) == ["explained_variance"]
    assert names(history(*[below] * 8, {"value/explained_variance": 0.4}), cfg) == []


def test_flat_scores():
    flat = {"objective/score_se": 0.0}
    assert names(history(flat)) == ["flat_scores"]
    assert names(history({"objective/score": 3e4, "objective/score_se": 1e-3})) == ["flat_scores"], "the last digit of float32"
    assert names(history(flat), config(train={"rollout_batch_size": 8})) == []


def evaluations(*pairs, error=0.0):
    """Lines with (score, held-out score), or without an evaluation where the pair is None."""
    return history(*({} if pair is None else {"evaluation/score": pair[0], "evaluation/heldout_score": pair[1], "evaluation/score_se": error} for pair in pairs))


def test_over_optimisation_is_a_rising_score_with_no_new_best_held_out_score():
    peaked = [(0.1, 0.5), None, (0.2, 0.7), (0.3, 0.6), None, (0.4, 0.7), (0.5, 0.6)]
    assert names(evaluations(*peaked)) == ["over_optimisation"], "three evaluations after the best one"
    assert names(evaluations(*peaked[:-1])) == []
    assert names(evaluations(*peaked, None)) == [], "said at evaluations"
    assert names(evaluations(*peaked[:-1], (0.5, 0.8))) == [], "a new best"
    assert names(evaluations(*peaked[:-1], (0.15, 0.6))) == [], "both fall: not what this is about"
    # .2 -> .5 with errors of .2 each: sqrt(.08) * 2 = .57; with .1 each: .28.
    assert names(evaluations(*peaked, error=0.2)) == []
    assert names(evaluations(*peaked, error=0.1)) == ["over_optimisation"]


def test_over_optimisation_is_news_at_the_first_evaluation_that_shows_it():
    """Every other line has no evaluation, so the check can't fail there: that it did not is no recovery."""
    lines, news = [], []
    for metrics in evaluations((0.1, 0.7), None, (0.2, 0.6), None, (0.3, 0.6), None, (0.4, 0.6), None, (0.5, 0.6), None, (0.6, 0.8), None):
        line, started = health.examine(metrics, lines, config())
        lines.append(line)
        news.append([finding.name for finding in started])
    assert [i for i, found in enumerate(news) if found] == [6]
    assert health.counts(lines) == {"over_optimisation": 2}


# -- what is made of findings


def test_a_check_is_news_when_it_had_not_failed_before():
    ill = WELL | {"policy/max_ratio": 11.0}
    lines, news = [], []
    for metrics in (ill, ill, WELL, ill):
        line, started = health.examine(metrics, lines, config())
        lines.append(line)
        news.append([finding.name for finding in started])
    assert news == [["ratio_explosion"], [], [], ["ratio_explosion"]]
    assert ["health/ratio_explosion" in line for line in lines] == [True, True, False, True]
    assert health.counts(lines) == {"ratio_explosion": 3}


def test_a_finding_reads_as_name_numbers_cause_and_remedy():
    (finding,) = health.findings(history({"policy/max_ratio": 12.3}), config())
    assert str(finding).startswith("ratio_explosion: largest ratio 12.3, limit 10. Cause: updates are too large")
    assert "Remedy: lower train.learning_rate" in str(finding)


def test_off_and_ignore():
    ill = history({"policy/max_ratio": 11.0, "policy/clip_fraction": 0.5})
    assert names(ill, config(health={"action": "off"})) == []
    assert names(ill, config(health={"ignore": ["ratio_explosion"]})) == ["clip_fraction"]


def test_stop_saves_before_it_raises_and_only_for_news():
    calls = []
    health.stop([], lambda: calls.append("saved") is None)
    assert calls == []
    found = health.findings(history({"policy/max_ratio": 11.0}), config())
    with pytest.raises(UserError, match=r"ratio_explosion: largest ratio 11(.|\n)*The run is saved as it is"):
        health.stop(found, lambda: calls.append("saved") is None)
    assert calls == ["saved"]
    with pytest.raises(UserError, match=r"ratio_explosion: largest ratio 11(.|\n)*could not be saved as it is, and goes on from its last save"):
        health.stop(found, lambda: False)
