"""The optimizer: two groups, betas, and learning rates that follow from the iteration alone."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from configs.errors import UserError
from configs.load import load_text
from stages.ppo.optimizer import optimizer_of, set_learning_rate, share_of_peak
from tests.unit.ppo_samples import config
from tests.unit.test_ppo_update import module_of


def test_row_16_policy_and_value_function_have_learning_rates_of_their_own():
    module = module_of()
    cfg = config(train={"iterations": 4, "learning_rate": 1e-3, "value_learning_rate": 5e-3})
    optimizer = optimizer_of(cfg, SimpleNamespace(trained=module))
    policy, value = (g["params"] for g in optimizer.param_groups)
    assert {id(p) for p in policy} | {id(p) for p in value} == {id(p) for p in module.parameters()}
    assert len(policy) + len(value) == len(list(module.parameters()))
    assert {id(p) for p in module.value_head.parameters()} <= {id(p) for p in value}
    rates = []
    for iteration in range(4):
        set_learning_rate(optimizer, cfg, iteration)
        rates.append([g["lr"] for g in optimizer.param_groups])
    assert rates == [pytest.approx([1e-3 * s, 5e-3 * s]) for s in (1, 0.75, 0.5, 0.25)], "linear to 0, which would be iteration 5"
    assert all(g["eps"] == 1e-5 and g["weight_decay"] == 0 for g in optimizer.param_groups)


def shares(**train):
    cfg = config(train=train)
    return [share_of_peak(i, cfg.train) for i in range(cfg.train.iterations)]


def test_row_16_row_25_the_warm_up_rises_from_a_tenth_and_linear_falls_from_its_end():
    """Four iterations of warm-up: 0.1, then 0.9 / 4 more each; then 6 iterations from 1 to 0, so sixths."""
    expected = [0.1, 0.325, 0.55, 0.775, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]
    assert shares(iterations=10, warmup_iterations=4) == pytest.approx(expected)
    assert shares(iterations=10, warmup_iterations=4, schedule="constant") == pytest.approx([*expected[:4], *[1] * 6])


def test_row_16_cosine_by_hand_and_the_floor():
    """Half a cosine over four iterations: (1 + cos(i pi / 4)) / 2; a floor of 0.2 squeezes it into 0.2 to 1."""
    plain = [1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]
    assert shares(iterations=4, schedule="cosine") == pytest.approx(plain)
    assert shares(iterations=4, schedule="cosine", learning_rate_floor=0.2) == pytest.approx([0.2 + 0.8 * share for share in plain])
    assert shares(iterations=4, learning_rate_floor=0.2) == pytest.approx([1, 0.8, 0.6, 0.4])
    assert shares(iterations=4, schedule="constant", learning_rate_floor=0.2) == [1] * 4


def test_row_16_a_warm_up_that_never_ends_is_refused():
    with pytest.raises(UserError, match=r"warmup_iterations 5 must be below train.iterations 5"):
        load_text("name: a\ninit_from: b\nprompts: p\nscorers: [{kind: length, target: 5}]\ntrain: {iterations: 5, warmup_iterations: 5}\n", "ppo")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("scorers: [{kind: length, target: 5}]\ntrain: {iterations: 5, value_warmup_iterations: 5}", r"value_warmup_iterations 5 must be below train.iterations 5, or the policy learns in none"),
        ("scorers: [{kind: length, target: 5, weight: 0}]", r"the weight of the scorer is 0, so every completion would score 0"),
        ("scorers: [{kind: length, target: 5, weight: 0}, {kind: length, target: 6, weight: 0}]", r"the weight of each of the 2 scorers is 0"),
        ("scorers: [{kind: length, target: 5}]\nevaluation: {scorers: [{kind: length, target: 5, weight: 0.0}]}", r"the weight of the scorer is 0"),
    ],
)
def test_a_run_that_could_learn_nothing_is_refused(text, message):
    with pytest.raises(UserError, match=message):
        load_text(f"name: a\ninit_from: b\nprompts: p\n{text}\n", "ppo")


def test_a_scorer_of_weight_0_beside_another_is_only_measured():
    cfg = load_text("name: a\ninit_from: b\nprompts: p\nscorers: [{kind: length, target: 5, weight: 0}, {kind: length, target: 6}]\n", "ppo")
    assert [(scorer.target, scorer.weight) for scorer in cfg.scorers] == [(5, 0.0), (6, 1.0)]


def test_row_16_adams_betas_are_the_configs():
    optimizer = optimizer_of(config(train={"adam_beta1": 0.8, "adam_beta2": 0.95}), SimpleNamespace(trained=module_of()))
    assert all(group["betas"] == (0.8, 0.95) for group in optimizer.param_groups)
