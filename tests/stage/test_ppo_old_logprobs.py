"""Row 8 and trap 11: old log-probs are the sampler's where they are a training forward's, and are computed again where they are not."""

from __future__ import annotations

from functools import partialmethod

import pytest
import torch

from configs.schema import PPOStage
from stages.ppo.collect import recomputed, starts_from_sampler
from stages.ppo.engines.generate import GenerateEngine
from stages.ppo.engines.native import NativeEngine
from stages.ppo.modules import PolicyAndValue
from stages.ppo.update import minibatches
from tests.stage.ppo_runs import (
    LORA,
    assembled,
    metrics,
    publish_policy,
    publish_reward,
    rollout_of,
    run,
    settings,
    workspace,
)
from tests.unit.ppo_samples import config

KINDS = {"copy": {}, "head": {"value_function": "head"}, "lora": {"lora": LORA, "scorers": [{"kind": "model", "checkpoint": "reward/adapter"}]}}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = workspace(tmp_path_factory.mktemp("old"))
    publish_policy(folder, "one")
    publish_reward(folder, "adapter", lora=True, seed=6)
    return folder


@pytest.mark.parametrize(
    ("engine", "precision", "expected"),
    [
        ({}, "fp32", True), ({}, "bf16", False), ({"kind": "generate"}, "fp32", False), ({"kind": "generate", "old_logprobs": "sampler"}, "fp32", True),
        ({"old_logprobs": "sampler"}, "bf16", True), ({"old_logprobs": "forward"}, "fp32", False),
    ],
)  # fmt: skip
def test_auto_trusts_the_native_engine_in_float32_alone(engine, precision, expected):
    assert starts_from_sampler(config(engine=engine, train={"precision": precision})) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_the_policy_reads_no_rollout_that_it_has_sampled(place, kind, monkeypatch):
    """The pass that is saved is saved, and what it would have computed is what the sampler gave: log-probs to 1e-5 nats, entropies to 1e-4."""
    cfg, accelerator, tokens, built, prompts = assembled(settings(place, **KINDS[kind]))
    passes = []
    inner = PolicyAndValue.logprobs
    monkeypatch.setattr(PolicyAndValue, "forward", lambda *_, **__: pytest.fail("a pass over policy and value function"))
    monkeypatch.setattr(PolicyAndValue, "logprobs", lambda *a, **k: (passes.append(1), inner(*a, **k))[1])
    rollout = rollout_of(cfg, accelerator, tokens, built, prompts)
    assert not passes
    mask = rollout.tokens.mask
    assert torch.equal(rollout.old_logprobs, rollout.sampler_logprobs)
    assert rollout.values[:, :-1][mask].abs().max() > 0 or kind == "head", "a head that starts at zero says zero"
    again = recomputed(rollout, built.trained, cfg, accelerator)
    assert passes
    torch.testing.assert_close(again.old_logprobs[mask], rollout.old_logprobs[mask], atol=1e-5, rtol=0)
    with torch.no_grad():
        entropy = inner(built.trained, rollout.tokens, True).entropy
    torch.testing.assert_close(rollout.entropy[mask], entropy[mask], atol=1e-4, rtol=0)


def test_both_ways_lead_to_the_same_run(place):
    lines = []
    for how in ("auto", "forward"):
        values = settings(place, f"way-{how}", {"iterations": 2}, engine={"old_logprobs": how}, lora=LORA)
        run(values)
        lines.append(metrics(values))
    for one, two in zip(*lines, strict=True):
        assert one.keys() == two.keys()
        assert one["rollout/sampler_compared"] < two["rollout/sampler_compared"] == 8 * two["rollout/length"], "the first of two minibatches, every token"
        for key in one.keys() - {"rollout/sampler_compared"}:
            assert one[key] == pytest.approx(two[key], abs=2e-3 if "ratio" in key else 2e-4), key
        assert 0 <= one["rollout/sampler_gap"] < 1e-5, "compared with the update's own forward pass"
        assert one["policy/first_ratio"] == pytest.approx(1, abs=1e-5)


def test_of_another_engine_every_token_is_compared_and_of_the_native_one_a_sample(place, monkeypatch):
    """The rows that are in the second minibatch of the first pass are off. A native engine's are compared in the first one: 4 of 8 rows."""
    values = settings(place, "partly", {"iterations": 1})
    cfg = PPOStage.model_validate(values)
    first, second = (set(rows.tolist()) for rows in minibatches(8, 2, seed=cfg.seed, iteration=0, epoch=0))
    lengths = []

    def off(inner, *arguments, **keywords):
        samples = inner(*arguments, **keywords)
        lengths[:] = [len(s.completion_ids) for s in samples]
        return [s._replace(logprobs=[x + 0.01 for x in s.logprobs]) if row in second else s for row, s in enumerate(samples)]

    for kind, engine in (("native", NativeEngine), ("generate", GenerateEngine)):
        with monkeypatch.context() as patch:
            patch.setattr(engine, "sample", partialmethod(lambda self, *a, inner, **k: off(inner, self, *a, **k), inner=engine.sample))
            run(values | {"name": kind, "output": str(place / f"partly-{kind}"), "engine": {"kind": kind, "old_logprobs": "sampler"}})
        (line,) = metrics(values | {"output": str(place / f"partly-{kind}")})
        everything, sampled = sum(lengths), sum(lengths[row] for row in first)
        assert line["rollout/sampler_compared"] == (sampled if kind == "native" else everything)
        assert line["rollout/sampler_gap"] == pytest.approx(0 if kind == "native" else 0.01, abs=1e-4)
        assert line["policy/first_ratio"] == pytest.approx(1, abs=1e-4)
        assert line["objective/kl"] == pytest.approx(0.01 * (everything - sampled) / 8 if kind == "native" else 0, abs=1e-4), "the forward's are the old ones"


@pytest.mark.parametrize(("by", "taken"), [(5e-4, True), (0.01, False)])
def test_log_probs_that_are_off_are_computed_again(place, by, taken, monkeypatch):
    """Every log-prob is off by as much: within the bound the update starts at a ratio of e^-by, beyond it at 1."""
    inner = NativeEngine.sample
    monkeypatch.setattr(NativeEngine, "sample", lambda *a, **k: [s._replace(logprobs=[x + by for x in s.logprobs]) for s in inner(*a, **k)])
    values = settings(place, "off-taken" if taken else "off-again", {"iterations": 1})
    run(values)
    (line,) = metrics(values)
    assert line["rollout/sampler_gap_mean"] == pytest.approx(by, abs=1e-5)
    assert line["policy/first_ratio"] == pytest.approx(1 - by if taken else 1, abs=2e-5)
    assert line["objective/kl"] == pytest.approx(by * line["rollout/length"] if taken else 0, abs=1e-4)
