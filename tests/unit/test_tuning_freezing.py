"""Frozen parts of a model: which they are, that nothing moves them, and when a schedule takes them up."""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers import LlamaForCausalLM

from configs.errors import UserError
from configs.schema import Freeze
from stages.tuning.freezing import Thaw, choose, decoder_layers
from tests.tiny import tiny_config


def model_of(layers: int = 3, **changes):
    torch.manual_seed(0)
    return LlamaForCausalLM(tiny_config(hidden=16, layers=layers, **changes)).requires_grad_(True)


def in_layer(number: int) -> str:
    return f"model.layers.{number}."


def test_layers_are_counted_by_the_config():
    layers = decoder_layers(model_of())
    assert sorted(set(layers.values())) == [0, 1, 2]
    assert all(in_layer(layer) in name for name, layer in layers.items())


@pytest.mark.parametrize(
    ("freeze", "frozen"),
    [
        ({"first": 2}, lambda n: in_layer(0) in n or in_layer(1) in n),
        ({"keep_last": 1}, lambda n: in_layer(0) in n or in_layer(1) in n),
        ({"keep_last": 3, "embeddings": True}, lambda n: "embed" in n),
        ({"embeddings": True}, lambda n: "embed" in n),
        ({"norms": True}, lambda n: "norm" in n),
        ({"patterns": ["mlp", r"layers\.2\.self_attn\.q"]}, lambda n: "mlp" in n or (in_layer(2) in n and "q_proj" in n)),
        ({"first": 1, "norms": True, "patterns": ["mlp"]}, lambda n: in_layer(0) in n or "norm" in n or "mlp" in n),
    ],
)
def test_what_is_frozen(freeze, frozen):
    model = model_of()
    Thaw(model, Freeze.model_validate(freeze))
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == {name for name, _ in model.named_parameters() if frozen(name)}


@pytest.mark.parametrize(
    ("freeze", "message"),
    [
        ({"first": 4}, "tune.freeze.first is 4, and LlamaForCausalLM has 3 decoder layers"),
        ({"patterns": ["mlq"]}, "'mlq' is found in no parameter's name of LlamaForCausalLM; they are such as model.embed_tokens.weight"),
        ({"patterns": ["."]}, "leaves nothing to train"),
        ({"first": 3, "norms": True, "embeddings": True}, "leaves nothing to train"),
    ],
)
def test_what_can_not_be_frozen_is_said(freeze, message):
    with pytest.raises(UserError, match=message):
        choose(model_of(), Freeze.model_validate(freeze))


def stepped(model, freeze: Freeze, steps: int, at: int = 0, optimizer=None):
    """Steps of AdamW with weight decay, as the Trainer takes them; the weights after each."""
    thaw = Thaw(model, freeze)
    optimizer = optimizer or torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    ids, after = torch.arange(24).view(2, 12), []
    for step in range(at, at + steps):
        thaw.at(step)
        model(input_ids=(ids + step) % 200, labels=(ids + step) % 200).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        after.append({name: p.detach().clone() for name, p in model.named_parameters()})
    return after, optimizer


def moved(before, after) -> set[str]:
    return {name for name in after if not torch.equal(before[name], after[name])}


def test_adamw_moves_no_frozen_weight_not_by_decay_either():
    model = model_of()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    after, _ = stepped(model, Freeze(first=1, embeddings=True), 3)
    names = set(before)
    assert moved(before, after[-1]) == {name for name in names if in_layer(0) not in name and "embed" not in name}


def test_layers_are_taken_up_from_the_top_after_so_many_steps_and_not_before():
    """first: 2, every 2 steps: layers 0 and 1 rest in steps 1 and 2, layer 0 in 3 and 4, none from step 5. Norms rest for good."""
    model = model_of()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    after, _ = stepped(model, Freeze(first=2, norms=True, unfreeze_every=2), 6)
    states = [before, *after]
    moves = [{name for name in moved(a, b) if "layers" in name} for a, b in itertools.pairwise(states)]
    layers = [sorted({int(name.split(".")[2]) for name in names}) for names in moves]
    assert layers == [[2], [2], [1, 2], [1, 2], [0, 1, 2], [0, 1, 2]]
    assert not {name for name in moved(before, after[-1]) if "norm" in name}


def test_a_schedule_is_a_function_of_the_step_so_a_resumed_run_is_the_same_run():
    freeze = Freeze(first=2, unfreeze_every=2)
    whole, _ = stepped(model_of(), freeze, 6)
    model = model_of()
    first, optimizer = stepped(model, freeze, 3)
    again = model_of()
    again.load_state_dict(first[-1], strict=False)
    resumed = torch.optim.AdamW(list(again.parameters()), lr=1e-2, weight_decay=0.1)
    resumed.load_state_dict(optimizer.state_dict())
    second, _ = stepped(again, freeze, 3, at=3, optimizer=resumed)
    assert not moved(whole[-1], second[-1])


def test_what_it_is_is_said_in_one_line():
    said = str(Thaw(model_of(), Freeze(keep_last=1, unfreeze_every=5)))
    assert said.endswith("(2 decoder layers); one layer more is trained after every 5 steps, all of them from step 11")
