"""Short PPO runs with every engine: they learn from what the engine sampled, say how far it is from the policy, and resume."""

from __future__ import annotations

import pytest
import torch

from stages.ppo import update
from stages.ppo.engines.native import NativeEngine
from stages.ppo.sampling import Sample
from tests.stage.ppo_runs import LORA, metrics, publish_reward, run, settings, weights, workspace
from tests.unit import fake_vllm

GAP = ("rollout/sampler_gap", "rollout/sampler_gap_mean", "rollout/sampler_kl", "rollout/importance_weight", "rollout/importance_truncated")
ENGINES = {"native": "native", "generate": "generate", "static": {"kind": "generate", "static_cache": True}, "continuous": "continuous",
           "vllm": "vllm", "server": {"kind": "vllm", "vllm": {"mode": "server", "url": "http://127.0.0.1:8000"}}}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = workspace(tmp_path_factory.mktemp("engines"))
    publish_reward(folder, "adapter", lora=True, seed=6)
    return folder


@pytest.fixture
def vllm(place, monkeypatch):
    """The stand-in for vLLM, on a machine that is taken to have a GPU."""
    from transformers import AutoModelForCausalLM

    fake_vllm.install(monkeypatch, AutoModelForCausalLM.from_pretrained(place / "base").eval())
    monkeypatch.setattr("stages.ppo.train.check_engine", lambda _: None)


@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("engine", list(ENGINES))
def test_row_8_a_run_with_each_engine(place, engine, mode, vllm):
    changes = {"lora": LORA, "scorers": [{"kind": "model", "checkpoint": "reward/adapter"}]} if mode == "lora" else {}
    values = settings(place, f"{engine}-{mode}", engine=ENGINES[engine], **changes)
    published = run(values)
    lines = metrics(values)
    assert [line["iteration"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert set(GAP) <= set(line)
        assert 0 <= line["rollout/sampler_gap_mean"] <= line["rollout/sampler_gap"] < 1e-4, "as near as float32 computes"
        assert 0 <= line["rollout/sampler_kl"] < 1e-8
        assert line["rollout/importance_weight"] == pytest.approx(1, abs=1e-4)
        assert line["rollout/importance_truncated"] == 0
        assert line["policy/first_ratio"] == pytest.approx(1, abs=1e-4)
    assert all(torch.isfinite(x).all() for x in weights(published).values())
    assert lines[-1]["objective/kl"] != lines[0]["objective/kl"], "the policy moved, and the engine sampled from where it moved to"


def test_row_22_generate_walks_the_native_engine_s_path(place):
    """The same draws and weights near 1: scores, lengths and KL of every iteration agree."""
    lines = []
    for name in ("native", "generate"):
        values = settings(place, f"path-{name}", engine=name)
        run(values)
        lines.append(metrics(values))
    for a, b in zip(*lines, strict=True):
        for key in ("objective/score", "objective/kl", "rollout/length", "policy/loss", "value/loss"):
            assert b[key] == pytest.approx(a[key], abs=1e-4)


class Off(NativeEngine):
    """An engine whose log-probs lie 0.5 nats too high: weights are e^-0.5."""

    def sample(self, prompt_ids, *, iteration, indices):
        rows = super().sample(prompt_ids, iteration=iteration, indices=indices)
        return [Sample(s.completion_ids, [x + 0.5 for x in s.logprobs], s.finished) for s in rows]


def test_row_8_the_weights_of_an_engine_that_is_off_reach_the_update(place, monkeypatch):
    seen = []
    real = update.update_policy

    def watched(module, optimizer, accelerator, experience, *arguments, **keywords):
        seen.append(experience.importance)
        return real(module, optimizer, accelerator, experience, *arguments, **keywords)

    monkeypatch.setattr("stages.ppo.engines.generate.GenerateEngine", lambda policy, **_: Off(policy))
    monkeypatch.setattr("stages.ppo.engines.build.TOLERANCE", 1.0)
    monkeypatch.setattr("stages.ppo.train.update_policy", watched)
    losses = {}
    for cap in (2.0, None):
        values = settings(place, f"off-{cap or 'uncapped'}", {"iterations": 1, "num_ppo_epochs": 1, "num_minibatches": 1}, engine={"kind": "generate", "importance_cap": cap})
        run(values)
        (line,) = metrics(values)
        losses[cap] = line["policy/grad_norm"]
        assert line["rollout/sampler_gap_mean"] == pytest.approx(0.5, abs=1e-4)
        assert line["rollout/importance_weight"] == pytest.approx(0.6065, abs=1e-3)
        assert line["rollout/sampler_kl"] == pytest.approx(0.6065 - 1 + 0.5, abs=1e-3)
    assert seen[1] is None
    assert losses[2.0] == pytest.approx(0.6065 * losses[None], rel=1e-3), "the policy's gradient is weighed"
    assert seen[0].min().item() == pytest.approx(0.6065, abs=1e-3)


def test_an_engine_that_samples_from_something_else_is_refused_before_the_first_iteration(place, monkeypatch):
    from configs.errors import UserError

    monkeypatch.setattr("stages.ppo.engines.generate.GenerateEngine", lambda policy, **_: Off(policy))
    values = settings(place, "refused", engine="generate")
    with pytest.raises(UserError, match=r"engine.kind generate: its log-probs differ from the policy's by 0.5 nats"):
        run(values)


@pytest.mark.parametrize("engine", ["generate", "continuous"])
def test_trap_14_a_run_that_was_killed_goes_on_to_the_same_bits(place, engine, monkeypatch):
    mortal = [{"kind": "python", "function": "tests.stage.ppo_runs:mortal"}]
    train = {"iterations": 4, "save_every": 2}
    whole = settings(place, f"whole-{engine}", train, engine=engine, scorers=mortal)
    straight = run(whole)
    values = settings(place, f"killed-{engine}", train, engine=engine, scorers=mortal)
    monkeypatch.setattr("tests.stage.ppo_runs.calls", 0)
    monkeypatch.setenv("PPO_TEST_DIES_AT", "stop:4")
    with pytest.raises(KeyboardInterrupt):
        run(values)
    assert len(metrics(values)) == 3
    monkeypatch.delenv("PPO_TEST_DIES_AT")
    resumed = run(values)
    assert metrics(values) == metrics(whole)
    first, second = weights(straight), weights(resumed)
    assert all(torch.equal(first[name], second[name]) for name in first)
