"""LoRA layers as one product: peft's own numbers and gradients, and a base weight that nothing is ever written to."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from stages.ppo.lora import SummedLinear, pays, use_sums

TOKENS = 64  # 64 x (16 + 24) > 2 x 16 x 24: the sum pays


class Net(nn.Module):
    def __init__(self, bias=True):
        super().__init__()
        self.layer = nn.Linear(16, 24, bias=bias)

    def forward(self, x):
        return self.layer(x)


def adapted(*, bias=True, trained=True, **changes):
    """One LoRA layer as peft makes it, with an adapter that says something unless `trained` is false."""
    torch.manual_seed(0)
    model = get_peft_model(Net(bias), LoraConfig(r=4, lora_alpha=8, target_modules=["layer"], **changes))
    if trained:
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter)
    return model


def summed(model):
    other = copy.deepcopy(model)
    use_sums(other)
    return other


def results(model, x):
    x = x.clone().requires_grad_()
    out = model(x)
    out.square().sum().backward()
    return [out.detach(), x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(TOKENS, 16), (4, 16, 16), (3, 7, 16)])
def test_outputs_and_gradients_are_pefts(shape, bias):
    model, x = adapted(bias=bias), torch.randn(shape)
    other = summed(model)
    layer = other.base_model.model.layer
    assert type(layer) is SummedLinear
    before = layer.base_layer.weight.clone()
    for one, two in zip(results(other, x), results(model, x), strict=True):
        torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)
    assert torch.equal(layer.base_layer.weight, before)


def test_through_onednn_too(taken):
    test_outputs_and_gradients_are_pefts((4, 16, 16), bias=True)
    assert taken


def test_an_adapter_that_says_nothing_leaves_the_layer_as_it_is_to_the_bit():
    model, x = summed(adapted(trained=False)), torch.randn(TOKENS, 16)
    with torch.no_grad(), model.disable_adapter():
        expected = model(x)
    with torch.no_grad():
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize(
    "changes", [{"lora_dropout": 0.5}, {"use_dora": True}, {"lora_bias": True}, {}], ids=["dropout", "dora", "bias", "two adapters"]
)
def test_other_kinds_of_adapters_are_left_to_peft(changes, monkeypatch):
    model = adapted(**changes)
    if not changes:
        model.add_adapter("other", LoraConfig(r=4, target_modules=["layer"]))
        model.base_model.set_adapter(["default", "other"])
    x = torch.randn(TOKENS, 16)
    expected = model.eval()(x)
    use_sums(model)
    monkeypatch.setattr("stages.ppo.lora._Sum.apply", lambda *_: pytest.fail("the sum was formed"))
    assert torch.equal(model(x), expected)


def test_it_pays_over_many_tokens_in_float32_only():
    weight, a = torch.zeros(24, 16), torch.zeros(4, 16)
    # 24 x 16 x 2 / (24 + 16) = 19.2 tokens
    assert [pays(torch.zeros(n, 16), weight, a) for n in (19, 20)] == [False, True]
    assert not pays(torch.zeros(TOKENS, 16).bfloat16(), weight.bfloat16(), a)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not pays(torch.zeros(TOKENS, 16), weight, a)
