"""What makes PPO light changes no number: recomputed activations, one graph at a time, quantised weights under adapters."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from transformers.models.llama.modeling_llama import LlamaMLP

from configs.errors import MissingExtra, UserError
from configs.schema import PPOStage
from stages.ppo import offload, train
from stages.ppo.collect import experience_of
from stages.ppo.modules import store_linear_weights
from stages.ppo.optimizer import optimizer_of
from stages.ppo.quantized import check as check_quantized
from stages.ppo.update import update_policy
from stages.tuning import quantized
from tests.stage.ppo_runs import LORA, assembled, metrics, publish_reward, rollout_of, run, settings, weights, workspace
from tests.unit.ppo_samples import model_of

ADAPTER = {"kind": "model", "checkpoint": "reward/adapter"}
WHOLE = {"kind": "model", "checkpoint": "reward/whole"}
MODES = {"copy": {}, "head": {"value_function": "head"}, "lora": {"lora": LORA}, "lora with reward adapter": {"lora": LORA, "scorers": [ADAPTER]}}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = workspace(tmp_path_factory.mktemp("light"))
    publish_reward(folder, "adapter", lora=True, seed=6)
    publish_reward(folder, "whole", seed=7)
    return folder


def updated(place, train, **changes):
    """Two iterations; the trained tensors after them, the second update's metrics, and how often a layer ran in it."""
    cfg, accelerator, tokens, built, prompts = assembled(settings(place, "light", train, **changes))
    optimizer, calls, metrics = optimizer_of(cfg, built), [], {}
    layer = next(m for m in built.trained.policy.modules() if isinstance(m, LlamaMLP))
    for iteration in range(2):
        rollout = rollout_of(cfg, accelerator, tokens, built, prompts, iteration)
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


def where_models_are(monkeypatch):
    """The models that are brought now, and every one that was, in turn."""
    here, travelled = set(), []

    @contextmanager
    def brought(model, device):
        assert model not in here, "brought twice"
        here.add(model)
        travelled.append(model)
        yield
        here.remove(model)

    monkeypatch.setattr(offload, "brought", brought)
    return here, travelled


def test_one_backbone_frozen_models_are_brought_for_their_use_and_change_nothing(place, monkeypatch):
    """Reference, reward model and held-out reward model, each once per rollout or evaluation; metrics and weights are those of a run without."""
    evaluation = {"every": 2, "prompts": str(place / "held_out.jsonl"), "samples_per_prompt": 2, "scorers": [ADAPTER]}
    kept = settings(place, "kept", {"iterations": 2}, scorers=[WHOLE], evaluation=evaluation)
    away = settings(place, "away", {"iterations": 2}, scorers=[WHOLE], evaluation=evaluation, offload_frozen=True)
    expected = weights(run(kept))
    here, travelled = where_models_are(monkeypatch)
    build = train.build_models
    frozen = {}

    def watched(*arguments):
        built = build(*arguments)
        frozen.update(reference=built.reference.model, scorer=built.scorer.parts["reward/whole"].scorer.model, heldout=built.heldout_scorer.parts["reward/adapter"].scorer.model)
        for model in frozen.values():
            model.base_model.register_forward_pre_hook(lambda *_, model=model: None if model in here else pytest.fail("used where it is not"))
        return built

    monkeypatch.setattr(train, "build_models", watched)
    found = weights(run(away))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert metrics(away) == metrics(kept)
    assert not here
    assert {name: travelled.count(model) for name, model in frozen.items()} == {"reference": 4, "scorer": 4, "heldout": 2}, "two rollouts and two evaluations"


def test_a_model_is_brought_and_taken_back_also_from_a_failure():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.seen = []

        def to(self, device):
            self.seen.append(str(device))

    def fail_with(model):
        with offload.brought(model, torch.device("meta")):
            model.seen.append("used")
            raise KeyError

    model = Model()
    with pytest.raises(KeyError):
        fail_with(model)
    assert model.seen == ["meta", "used", "cpu"]


def packing(monkeypatch):
    """bitsandbytes stood in for: weights are rounded to 1/8 and kept as bytes when a layer is moved, as there."""
    import sys
    from types import ModuleType

    class Params(nn.Parameter):
        def __new__(cls, data, requires_grad, quant_type, compress_statistics, module):
            assert (requires_grad, quant_type, compress_statistics) == (False, "nf4", True)
            return torch.Tensor._make_subclass(cls, data, False)

    class Packed(nn.Linear):
        def __init__(self, *sizes, bias, compute_dtype, quant_type, device):
            super().__init__(*sizes, bias=bias, device=device)
            self.compute_dtype = compute_dtype

        def to(self, device):
            self.weight = nn.Parameter((self.weight * 8).round().clamp(-127, 127).to(torch.int8), requires_grad=False)
            return self

        def forward(self, x):
            return nn.functional.linear(x.to(self.compute_dtype), self.weight.to(self.compute_dtype) / 8).to(x.dtype)

    layers = ModuleType("bitsandbytes.nn")
    layers.Linear4bit, layers.Params4bit = Packed, Params
    monkeypatch.setitem(sys.modules, "bitsandbytes", ModuleType("bitsandbytes"))
    monkeypatch.setitem(sys.modules, "bitsandbytes.nn", layers)
    return Packed


def test_a_quantised_backbone_keeps_heads_embeddings_and_norms_and_is_cast_by_nobody(monkeypatch):
    packed = packing(monkeypatch)
    model, before = model_of(tie_word_embeddings=False), model_of(tie_word_embeddings=False)
    quantized.quantize(model, torch.device("cpu"), torch.float32)
    store_linear_weights(model, torch.bfloat16)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert sum(type(m) is packed for m in layers.values()) == 14
    assert {m.weight.dtype for m in layers.values() if type(m) is packed} == {torch.int8}
    assert type(layers["lm_head"]) is nn.Linear
    assert layers["lm_head"].weight.dtype == torch.bfloat16, "the head alone is stored as the precision says"
    assert model.is_loaded_in_4bit, "without it peft would put a layer for float weights around packed ones"
    for name, old in before.named_modules():
        if name in layers and name != "lm_head":
            assert (layers[name].weight.float() / 8 - old.weight).abs().max() <= 1 / 16
    kept = {n: p for n, p in model.named_parameters() if "proj" not in n and n != "lm_head.weight"}
    assert all(torch.equal(p, before.get_parameter(n)) for n, p in kept.items())


def test_a_model_without_linear_layers_cannot_be_quantised(monkeypatch):
    packing(monkeypatch)
    with pytest.raises(UserError, match="GPT2LMHeadModel has no linear layers"):
        quantized.quantize(model_of("gpt2"), torch.device("cpu"), torch.float32)


def test_bad_input_quantization_where_it_cannot_be(place, monkeypatch):
    """On a CPU, without the package, without adapters: said before a model is loaded."""
    values = settings(place, "packed", lora=LORA, quantization="nf4")
    with pytest.raises(UserError, match=r"quantization: nf4 needs an NVIDIA GPU and this run is on cpu"):
        assembled(values)
    monkeypatch.setattr("configs.extras.find_spec", lambda _: None)
    with pytest.raises(MissingExtra, match=r"quantization: nf4.*align-stack\[quantization\]"):
        check_quantized(PPOStage.model_validate(values), torch.device("cuda"))
    with pytest.raises(ValidationError, match=r"quantization: nf4 is for a frozen backbone under adapters; add a `lora:` section"):
        PPOStage.model_validate(values | {"lora": None})
