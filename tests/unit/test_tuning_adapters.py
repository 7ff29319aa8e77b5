"""Adapters: what peft is asked for, learning rates by group, and the plain LoRA that is published of one that took its start out of the base."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import LlamaForCausalLM

from configs.errors import UserError
from configs.schema import IA3, Lora, PromptTuning
from stages.tuning import adapters, published
from stages.tuning.trainer import faster_b
from tests.tiny import tiny_config


def test_b_learns_faster_by_the_ratio_and_keeps_the_other_settings():
    model = get_peft_model(LlamaForCausalLM(tiny_config(hidden=16)), adapters.lora_config(Lora(rank=2), "CAUSAL_LM"))
    names = {id(p): name for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([{"params": [p for p in model.parameters() if p.requires_grad], "weight_decay": 0.3}, {"params": [], "weight_decay": 0.0}], lr=1e-3, betas=(0.8, 0.9))
    trained = sum(len(group["params"]) for group in optimizer.param_groups)
    faster_b(optimizer, model, 16.0)
    a, _, b = optimizer.param_groups
    assert (a["lr"], b["lr"], b["weight_decay"], b["betas"]) == (1e-3, 0.016, 0.3, (0.8, 0.9))
    assert all("lora_A" in names[id(p)] for p in a["params"])
    assert all("lora_B" in names[id(p)] for p in b["params"])
    assert len(a["params"]) + len(b["params"]) == trained


def test_a_trained_start_is_taken_off_as_an_adapter_of_twice_the_rank():
    """A = [1 2], B = [3 4]', start A0 = [1 0], B0 = [1 1]': BA - B0A0 = [[3 6], [4 8]] - [[1 0], [1 0]] = [[2 6], [3 8]]."""
    state = {"x.lora_A.default.weight": torch.tensor([[1.0, 2.0]]), "x.lora_B.default.weight": torch.tensor([[3.0], [4.0]]), "y": torch.ones(1)}
    initial = {"x.lora_A.default.weight": torch.tensor([[1.0, 0.0]]), "x.lora_B.default.weight": torch.tensor([[1.0], [1.0]])}
    made = published.plain(state, initial)
    assert (made["x.lora_B.default.weight"] @ made["x.lora_A.default.weight"]).tolist() == [[2.0, 6.0], [3.0, 8.0]]
    assert made["y"] is state["y"]
    assert state["x.lora_A.default.weight"].shape == (1, 2)


@pytest.mark.parametrize("rslora", [False, True])
def test_the_scale_stays_at_twice_the_rank(rslora):
    model = get_peft_model(LlamaForCausalLM(tiny_config(hidden=16)), adapters.lora_config(Lora(rank=3, alpha=5.0, rslora=rslora, init="olora"), "CAUSAL_LM"))
    before = model.peft_config["default"]
    with published.as_plain(model, published.remember(model), None):
        config = model.peft_config["default"]
        assert (config.r, config.init_lora_weights) == (6, True)
        scale = config.lora_alpha / config.r ** (0.5 if rslora else 1)
    assert model.peft_config["default"] is before
    assert scale == pytest.approx(5.0 / 3 ** (0.5 if rslora else 1))


def test_ia3_asks_for_layers_where_peft_has_no_choice_and_names_those_there_are():
    model = LlamaForCausalLM(tiny_config(hidden=16))
    assert adapters.ia3_config(IA3(), model).target_modules == {"k_proj", "v_proj", "down_proj"}
    with pytest.raises(UserError, match=r"no module 'q_prj'; its linear layers are down_proj, gate_proj"):
        adapters.ia3_config(IA3(target_modules=["q_prj"], feedforward_modules=[]), model)
    model.config.model_type = "unheard_of"
    with pytest.raises(UserError, match=r"no choice of layers for unheard_of; name them: tune.target_modules .* has the linear layers down_proj"):
        adapters.ia3_config(IA3(), model)


def test_what_is_not_built_is_refused():
    with pytest.raises(UserError, match="prompt_tuning is not built yet"):
        adapters.peft_config(PromptTuning(), "CAUSAL_LM", nn.Linear(1, 1))
