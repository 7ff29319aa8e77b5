"""What makes PPO light changes no number: recomputed activations, one graph at a time, quantised weights under adapters."""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaMLP

from stages.ppo.collect import Clock, collect_rollout, experience_of
from stages.ppo.train import optimizer_of
from stages.ppo.update import update_policy
from tests.stage.ppo_runs import LORA, assembled, publish_reward, settings, workspace

ADAPTER = {"kind": "model", "checkpoint": "reward/adapter"}
MODES = {"copy": {}, "head": {"value_function": "head"}, "lora": {"lora": LORA}, "lora with reward adapter": {"lora": LORA, "scorers": [ADAPTER]}}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = workspace(tmp_path_factory.mktemp("light"))
    publish_reward(folder, "adapter", lora=True, seed=6)
    return folder


def updated(place, train, **changes):
    """Two iterations; the trained tensors after them, the second update's metrics, and how often a layer ran in it."""
    cfg, accelerator, tokens, built, prompts = assembled(settings(place, "light", train, **changes))
    optimizer, calls, metrics = optimizer_of(cfg, built), [], {}
    layer = next(m for m in built.trained.policy.modules() if isinstance(m, LlamaMLP))
    for iteration in range(2):
        rollout = collect_rollout(built.trained, built.reference, built.scorer, prompts, cfg, accelerator, iteration=iteration, tokens=tokens, clock=Clock())
        experience, _ = experience_of(rollout, cfg, kl_coef=cfg.kl_coef, mean=built.scorer.mean, std=built.scorer.std)
        if cfg.train.gradient_checkpointing:
            built.trained.train()
        calls.clear()
        hook = layer.register_forward_pre_hook(lambda *_: calls.append(1))
        metrics = update_policy(built.trained, optimizer, accelerator, experience, cfg, iteration)
        hook.remove()
    return {n: p.detach().clone() for n, p in built.trained.named_parameters() if p.requires_grad}, metrics, len(calls)


@pytest.mark.parametrize("mode", MODES)
def test_recomputed_activations_give_the_same_weights_to_the_bit(place, mode):
    """With one backbone the layer that is recomputed must find the adapter its forward had."""
    kept, expected, once = updated(place, {}, **MODES[mode])
    recomputed, metrics, twice = updated(place, {"gradient_checkpointing": True}, **MODES[mode])
    assert twice == 2 * once, "every layer runs again in the backward pass"
    assert kept.keys() == recomputed.keys()
    assert not [name for name in kept if not torch.equal(kept[name], recomputed[name])]
    assert metrics == expected
