"""The monitor on histories made by hand: what is best, and what stops a run."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from stages.evaluation.statistics import student_t_tail
from stages.ppo.monitor import Observation, Rules, Scored, State, over_optimised, see

PROMPTS, SAMPLES = 12, 16
GROUPS = [g for g in range(PROMPTS) for _ in range(SAMPLES)]
METRIC = "evaluation/heldout_score"


def rules(**changes):
    return Rules(**({"metric": METRIC, "groups": GROUPS, "evaluations": 19, "over_optimisation": 0.05} | changes))


def observation(iteration, heldout, proxy, kl=1.0, finite=True):
    """An evaluation with these scores per completion."""
    metrics = {METRIC: float(np.mean(heldout)), "evaluation/score": float(np.mean(proxy)), "evaluation/kl": kl}
    return Observation(Scored(iteration, tuple(map(float, heldout)), tuple(map(float, heldout)))._replace(proxy=tuple(map(float, proxy))), metrics, finite)


def play(curve, proxies, rules, seed=0, noise=0.3):
    """Evaluations whose true means are `curve` and `proxies`: the state after the last, and the decisions up to a stop.

    A completion's noise has a part of its prompt, one of its own that every evaluation shares, and one of the moment.
    """
    rng = np.random.default_rng(seed)
    shared = rng.normal(0, noise, len(GROUPS)) + np.repeat(rng.normal(0, noise, PROMPTS), SAMPLES)
    state, decisions = State("key"), []
    for number, (mean, proxy) in enumerate(zip(curve, proxies, strict=True)):
        moment = rng.normal(0, noise, len(GROUPS)) + np.repeat(rng.normal(0, noise / 10, PROMPTS), SAMPLES)
        state, decision = see(state, observation(number * 5, mean + shared + moment, proxy + rng.normal(0, 1, len(GROUPS))), rules)
        decisions.append(decision)
        if decision.stop:
            break
    return state, decisions


def test_a_healthy_noisy_rise_is_never_stopped():
    curve, proxies = 0.4 + 0.5 * (1 - np.exp(-np.arange(19) / 5)), np.arange(19) / 2
    assert [seed for seed in range(200) if play(curve, proxies, rules(), seed)[0].stopped] == []


def test_a_held_out_score_that_stays_is_stopped_no_more_often_than_the_level_says():
    """Flat from the first evaluation on, while the training score rises: the worst case of the bound, 300 runs."""
    stopped = sum(bool(play(np.full(19, 0.5), np.arange(19), rules(), seed)[0].stopped) for seed in range(300))
    assert stopped <= 15, f"{stopped} of 300 at a level of 0.05"


def test_a_plateau_after_a_rise_is_not_stopped():
    curve = np.minimum(0.4 + 0.1 * np.arange(19), 0.8)
    assert [seed for seed in range(100) if play(curve, np.arange(19), rules(), seed)[0].stopped] == []


def test_a_collapse_is_stopped_near_its_peak_and_the_peak_is_the_best():
    curve = np.concatenate([np.linspace(0.35, 0.75, 7), np.linspace(0.70, -0.13, 12)])
    for seed in range(50):
        state, decisions = play(curve, np.arange(19) / 3, rules(), seed)
        assert state.stopped == "over_optimisation"
        assert len(decisions) - 1 <= 11, f"seed {seed}: the peak is evaluation 6, the stop came at {len(decisions) - 1}"
        assert state.bests[-1] in (25, 30, 35), state.bests
        assert "has fallen by" in decisions[-1].why


def test_a_collapse_of_both_scores_is_not_called_over_optimisation():
    """The training score falls too: the run is broken otherwise, and patience or a person ends it."""
    curve = np.concatenate([np.linspace(0.35, 0.75, 7), np.linspace(0.70, -0.13, 12)])
    state, _ = play(curve, 10 * curve, rules())
    assert state.stopped is None
    state, decisions = play(curve, 10 * curve, rules(patience=3))
    assert state.stopped == "patience"
    assert state.history[-1]["iteration"] == state.bests[-1] + 15
    assert decisions[-1].why == "no better evaluation/heldout_score in 3 evaluations"


def test_over_optimisation_by_the_training_score_publishes_nothing_after_the_held_out_peak():
    """Every evaluation has the highest training score so far. The held-out means are 0 2 1.9 0: its peak is iteration 5, the fall to 0 is certain."""
    given = rules(metric="evaluation/score", groups=(0, 1, 2), evaluations=2)
    state, decisions = State("key"), []
    for number, heldout in enumerate(([0, 0, 0], [2, 2, 2], [1.9, 1.9, 1.9], [0, 0, 0])):
        before = state
        state, decision = see(state, observation(5 * number, heldout, [number] * 3), given)
        decisions.append(decision)
    assert [d.stop for d in decisions] == [None, None, None, "over_optimisation"]
    assert [d.best for d in decisions] == [True, True, True, False]
    assert before.bests == (0, 5, 10)
    assert state.bests == (0, 5)
    assert State.from_json(json.loads(json.dumps(before.as_json()))).kept(1) == before.kept(1) == (5, 10)
    assert state.kept(1) == (5,)


def test_what_is_kept_is_the_newest_bests_and_the_newest_up_to_the_peak():
    peak = observation(10, [9, 9], [0, 0]).scored
    assert State("key", bests=(0, 5, 10, 15, 20, 25), peak=peak).kept(2) == (5, 10, 20, 25)
    assert State("key", bests=(0, 5, 10, 15), peak=peak).kept(2) == (5, 10, 15)
    assert State("key", bests=(0, 5, 15, 20, 25), peak=peak).kept(1) == (5, 25)
    assert State("key", bests=(15, 20), peak=peak).kept(1) == (20,)
    assert State("key").kept(2) == ()


def hand(heldout, proxy, level, tolerated=0.0, evaluations=2):
    """start 0 0 0, peak 1 2 3, then `heldout`, one completion for each of three prompts."""
    given = Rules(metric=METRIC, groups=(0, 1, 2), evaluations=evaluations, over_optimisation=level, tolerated_fall=tolerated)
    state, _ = see(State("key"), observation(0, [0, 0, 0], [0, 0, 0]), given)
    state, _ = see(state, observation(5, [1, 2, 3], [1, 1, 1]), given)
    return over_optimised(state, observation(10, heldout, proxy).scored, given)


def test_the_test_against_a_hand_worked_number():
    """Falls 1, 2, 3: mean 2, se 1/√3, t = 2√3 = 3.4641 with two degrees of freedom; tail (1 - t/√(t² + 2))/2 = (1 - √(6/7))/2 = 0.037090."""
    assert student_t_tail(2 * math.sqrt(3), 2) == pytest.approx((1 - math.sqrt(6 / 7)) / 2, abs=1e-12)
    fall = hand([0, 0, 0], [2, 2, 2], 0.0371)
    assert fall is not None
    assert fall == (2.0, pytest.approx(1 / math.sqrt(3)))
    assert hand([0, 0, 0], [2, 2, 2], 0.0370) is None
    assert hand([0, 0, 0], [2, 2, 2], 3 * 0.0370, evaluations=3) is None, "three evaluations make three pairs"
    assert hand([0, 0, 0], [2, 2, 2], 3 * 0.0371, evaluations=3) is not None
    assert hand([0, 0, 0], [1, 1, 1], 0.0371) is None, "the training score has not risen"


def test_the_part_of_the_gain_that_may_be_lost_does_not_count():
    """Falls .5 .5 .5 of gains 1 2 3 with half of them tolerated: excess 0, -.5, -1. With a tenth: .4 .3 .2, t = .3/(.1/√3) = 5.196, tail 0.01755."""
    assert hand([0.5, 1.5, 2.5], [2, 2, 2], 0.9, tolerated=0.5) is None
    assert hand([0.5, 1.5, 2.5], [2, 2, 2], 0.0175, tolerated=0.1) is None
    assert hand([0.5, 1.5, 2.5], [2, 2, 2], 0.0176, tolerated=0.1) is not None


def test_a_fall_of_every_prompt_alike_has_no_noise_and_a_single_prompt_proves_nothing():
    assert hand([0, 1, 2], [2, 2, 2], 1e-9) == (1.0, 0.0)
    one = Rules(metric=METRIC, groups=(0, 0), evaluations=2, over_optimisation=0.5)
    state, _ = see(State("key"), observation(0, [3, 3], [0, 0]), one)
    assert see(state, observation(5, [-9, -9], [1, 1]), one)[1].stop is None


def steps(values, rule, kls=None, finite=None):
    """States and decisions of evaluations with these metric values."""
    state, decisions = State("key"), []
    for i, value in enumerate(values):
        seen = observation(i, [value] * 2, [0.0, 0.0], (kls or [1.0] * len(values))[i], (finite or [True] * len(values))[i])
        state, decision = see(state, seen, rule)
        decisions.append(decision)
    return state, decisions


def two(**changes):
    return rules(groups=(0, 1), over_optimisation=None, **changes)


def test_of_equals_the_first_is_the_best():
    state, decisions = steps([1, 2, 2, 1], two())
    assert state.bests == (0, 1)
    assert [d.best for d in decisions] == [True, True, False, False]


def test_lower_is_better_for_kl_and_after_a_minus():
    for metric in ("evaluation/kl", "-evaluation/heldout_score"):
        state, _ = steps([3, 2, 4], two(metric=metric), kls=[3, 2, 4])
        assert state.bests == (0, 1), metric
    assert two(metric="evaluation/kl_k3").sign == -1
    assert two(metric="evaluation/win_rate").sign == 1


def test_what_is_not_a_finite_number_is_never_the_best():
    nan = float("nan")
    assert steps([1, nan, 2, 3], two())[0].bests == (0, 2, 3)
    assert steps([1, 2, 3], two(), kls=[0, nan, 1])[0].bests == (0, 2)
    assert steps([1, 2, 3], two(), kls=[0, math.inf, 1])[0].bests == (0, 2)
    assert steps([1, 2, 3], two(), finite=[True, False, True])[0].bests == (0, 2)
    assert steps([nan, nan], two(patience=2))[0].bests == ()
    assert steps([1, 2], two(kl_budget=3), kls=[0, nan])[0].stopped == "kl_budget"


def test_above_the_kl_budget_a_run_stops_and_nothing_is_published():
    state, decisions = steps([1, 2, 9], two(kl_budget=5.0), kls=[0, 5.0, 5.01])
    assert [d.stop for d in decisions] == [None, None, "kl_budget"]
    assert state.bests == (0, 1)
    assert decisions[-1].why == "KL 5.01 nats per completion is above stopping.kl_budget 5"


def test_patience_counts_evaluations_since_the_best():
    _, decisions = steps([1, 2, 1, 3, 2, 2], two(patience=2))
    assert [d.stop for d in decisions] == [None, None, None, None, None, "patience"]


def test_the_state_survives_a_save_to_the_bit():
    state, _ = play(np.linspace(0.3, 0.7, 4), np.arange(4), rules())
    assert State.from_json(json.loads(json.dumps(state.as_json()))) == state
    assert State.from_json(json.loads(json.dumps(State("key").as_json()))) == State("key")


def test_a_kl_budget_lowered_within_a_run_holds_for_the_policies_it_has_kept():
    state, _ = steps([1, 2, 3], two(kl_budget=9.0), kls=[0, 2, 5])
    assert state.bests == (0, 1, 2)
    assert state.under(two(kl_budget=9.0)) == state
    assert state.under(two(kl_budget=2.5)).bests == (0, 1)
    assert state.under(two(kl_budget=2.5)).history == state.history
