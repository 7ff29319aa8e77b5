"""oneDNN's matrix products: float32 like torch's own, taken for few shapes only, and by a rule that is no measurement."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from stages import models, onednn
from stages.loss import logprobs
from stages.ppo import forward
from stages.ppo.modules import PolicyAndValue
from tests.unit.ppo_samples import model_of, ragged_ids, tokens_of


@pytest.mark.parametrize(("rows", "expected"), [(0, 0), (1, 8), (8, 8), (9, 16), (127, 128), (129, 136), (255, 256), (1664, 1664), (1665, 1728), (2049, 2176)])
def test_whole_is_the_next_multiple_of_8_and_of_a_sixteenth_of_the_power_of_two_below(rows, expected):
    assert onednn.whole(rows) == expected


def test_few_shapes_are_whole_and_little_is_padded():
    sizes = {onednn.whole(n) for n in range(1, 4097)}
    assert len(sizes) == 16 + 16 * 5  # 8, 16 ... 128, then 16 up to each of 256, 512, 1024, 2048 and 4096
    assert all(n <= onednn.whole(n) <= max(n + 7, n * 17 / 16) for n in range(1, 4097))
    assert all(onednn.whole(n) == n for n in sizes)
    assert [onednn.at_most(n) for n in (3, 8, 229, 256, 1700)] == [3, 8, 224, 256, 1664]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("shape", "products"), [((2, 8, 24), 3), ((3, 5, 24), 0)])
def test_a_linear_layer_and_its_gradients_are_those_of_float64(shape, products, bias, taken):
    torch.manual_seed(0)
    layer = nn.Linear(24, 40, bias=bias)
    x, push = torch.randn(shape, requires_grad=True), torch.randn(*shape[:-1], 40)
    found = onednn.linear(x, layer.weight, layer.bias)
    found.backward(push)
    exact, exact_x = copy.deepcopy(layer).double(), x.detach().double().requires_grad_()
    exact.zero_grad()
    expected = exact(exact_x)
    expected.backward(push.double())
    assert len(taken) == products
    for one, other in ((found, expected), (x.grad, exact_x.grad), *((p.grad, q.grad) for p, q in zip(layer.parameters(), exact.parameters(), strict=True))):
        torch.testing.assert_close(one.double(), other, atol=1e-5, rtol=1e-5)


def test_other_types_and_autocast_are_left_to_torch(taken):
    x, weight = torch.randn(8, 16), torch.randn(4, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(onednn.linear(x, weight), F.linear(x, weight))
    assert torch.equal(onednn.linear(x.double(), weight.double()), F.linear(x.double(), weight.double()))
    assert torch.equal(onednn.product(x.bfloat16(), weight.bfloat16()), x.bfloat16() @ weight.bfloat16().t())
    assert not taken


@pytest.mark.parametrize(("least", "products"), [(8 * 24 * 40, 5), (8 * 24 * 40 + 1, 0)])
def test_a_product_of_few_multiplications_is_left_to_torch(least, products, taken, monkeypatch):
    """x [8, 24] and a layer of 24 to 40: its output, its two gradients, a product and a sum of gradients are 8 * 24 * 40 multiplications each."""
    monkeypatch.setattr(onednn, "LEAST_WORK", least)
    monkeypatch.setattr(onednn, "LEAST_GRADIENT_WORK", least)
    layer, x, total = nn.Linear(24, 40, bias=False), torch.randn(8, 24, requires_grad=True), torch.zeros(40, 24)
    onednn.linear(x, layer.weight).sum().backward()
    onednn.product(x.detach(), layer.weight.detach())
    onednn.add_weight_gradient(total, x.detach(), torch.ones(8, 40))
    assert len(taken) == products
    torch.testing.assert_close(total, layer.weight.grad)


@pytest.mark.parametrize(("width", "features", "copied"), [(24, 40, (24, 8)), (40, 24, (24, 8)), (24, 24, (24, 8))])
def test_of_a_weights_gradient_the_narrower_factor_is_the_one_that_is_copied(width, features, copied, taken):
    rows, grad, total = torch.randn(8, width), torch.randn(8, features), torch.ones(features, width)
    found = onednn.weight_gradient(rows, grad)
    onednn.add_weight_gradient(total, rows, grad)
    assert taken == [copied, copied]
    torch.testing.assert_close(found, grad.t() @ rows)
    torch.testing.assert_close(total, 1 + grad.t() @ rows)


def test_the_gradient_of_a_small_weight_is_left_to_torch_where_its_products_are_not(taken, monkeypatch):
    monkeypatch.setattr(onednn, "LEAST_GRADIENT_WORK", 8 * 24 * 40 + 1)
    layer, x = nn.Linear(24, 40, bias=False), torch.randn(8, 24, requires_grad=True)
    onednn.linear(x, layer.weight).sum().backward()
    assert taken == [(8, 24), (8, 40)]
    assert torch.equal(layer.weight.grad, torch.ones(8, 40).t() @ x.detach())


def test_only_plain_linear_layers_change_and_only_where_it_is_faster(taken, monkeypatch):
    class Own(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(4, 4), Own(4, 4), nn.Linear(4, 4).double())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    monkeypatch.setattr(onednn, "faster", lambda: False)
    onednn.use_onednn(model, None)
    assert [type(layer) for layer in model] == [nn.Linear, Own, nn.Linear]
    monkeypatch.setattr(onednn, "faster", lambda: True)
    onednn.use_onednn(model, None)
    assert [type(layer) for layer in model] == [onednn.OneDNNLinear, Own, nn.Linear]
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def outputs_and_gradients(module, tokens):
    out = module(tokens)
    (out.logprobs.sum() + out.values.sum()).backward()
    return [out.logprobs.detach(), out.values.detach(), *(p.grad for p in module.parameters() if p.requires_grad)]


@pytest.mark.parametrize("frozen_head", [True, False])
@pytest.mark.parametrize("kept", [0, 2**25])
def test_padded_to_whole_rows_a_forward_and_backward_pass_is_the_one_without(frozen_head, kept, taken, monkeypatch):
    """Rows, chunks of logits and widths are padded for oneDNN; nothing of that may reach a log-prob, a value or a gradient."""
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", 32 * 17)
    monkeypatch.setattr(logprobs, "KEPT_ELEMENTS", kept)
    plain = PolicyAndValue(model_of(), model_of(seed=1).base_model, models.scalar_head(16, seed=0), temperature=0.7)
    plain.policy.get_output_embeddings().weight.requires_grad_(not frozen_head)
    other = copy.deepcopy(plain)
    onednn.use_onednn(other)
    tokens = tokens_of(*ragged_ids(6))
    assert int(tokens.mask.sum()) % 8, "the last chunk needs padding"
    expected = outputs_and_gradients(plain, tokens)
    assert not taken
    found = outputs_and_gradients(other, tokens)
    assert taken
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-4)


def test_a_row_is_not_padded_beyond_the_positions_a_model_has(taken):
    model = model_of("gpt2")
    limit = model.config.max_position_embeddings
    onednn.use_onednn(model)
    length = limit - 1
    tokens = tokens_of([[5] * (length - 2)], [[6, 7]])
    model.base_model.config.max_position_embeddings = length  # as if the model ended with this row
    model.base_model.wpe.weight.data[length:] = float("nan")
    model.base_model.h[0].mlp.add_module("extra", onednn.OneDNNLinear(4, 4))
    assert forward.hidden_states(model.base_model, tokens).isfinite().all()
