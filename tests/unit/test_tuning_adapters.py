"""Adapters: what peft is asked for, learning rates by group, and the plain LoRA that is published of one that took its start out of the base."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model
from transformers import LlamaForCausalLM, Trainer

from configs.errors import MissingExtra, UserError
from configs.schema import IA3, Lora, SFTStage
from stages.tuning import adapters, possible, published
from stages.tuning.trainer import faster_b, tuned
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


def test_an_embedding_beside_layers_that_took_their_start_out_of_the_base_is_published_at_twice_the_rank_too(tmp_path):
    """peft starts it at 0; at its own rank the folder could not be loaded."""
    from peft import PeftModel

    base = LlamaForCausalLM(tiny_config(hidden=16, tie_word_embeddings=False)).eval()
    untouched = copy.deepcopy(base)
    model = get_peft_model(base, adapters.lora_config(Lora(rank=2, init="pissa", target_modules=["embed_tokens", "q_proj"]), "CAUSAL_LM")).eval()
    initial = published.remember(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    with published.as_plain(model, initial, None) as state:
        model.save_pretrained(tmp_path, state_dict=state)
    ids = torch.arange(12).view(1, 12)
    with torch.no_grad():
        torch.testing.assert_close(PeftModel.from_pretrained(untouched, tmp_path)(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


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


def test_an_adapter_on_a_tied_head_is_refused_before_it_is_trained():
    """It could be trained and published, and then neither merged nor be anybody's parent."""
    with pytest.raises(UserError, match="share one weight"):
        adapters.ia3_config(IA3(target_modules=["k_proj", "lm_head"], feedforward_modules=[]), LlamaForCausalLM(tiny_config(hidden=16)))
    untied = LlamaForCausalLM(tiny_config(hidden=16, tie_word_embeddings=False))
    assert adapters.ia3_config(IA3(target_modules=["k_proj", "lm_head"], feedforward_modules=[]), untied).target_modules == {"k_proj", "lm_head"}


SFT = {"name": "a", "init_from": "x", "data": "rows.jsonl"}


@pytest.mark.parametrize("tune", [{"method": "ia3"}, {"method": "lora", "rank": 2, "dora": True}])
def test_weight_decay_leaves_factors_alone(tune):
    """At 0 an IA3 factor is a layer that says nothing, and not the layer as it was."""
    cfg = SFTStage.model_validate(SFT | {"tune": tune})
    base = LlamaForCausalLM(tiny_config(hidden=16))
    model = get_peft_model(base, adapters.peft_config(cfg.technique, "CAUSAL_LM", base))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    maker = tuned(Trainer, cfg)
    decayed = trained & set(maker.get_decay_parameter_names(object.__new__(maker), model))
    factors = {name for name in trained if "ia3_l" in name or "magnitude" in name}
    assert factors
    assert decayed == trained - factors


@pytest.mark.parametrize(
    ("zero", "changes", "message"),
    [
        (3, {"lora": {"dora": True}}, "dora at ZeRO-3: it needs the norm of whole weights"),
        (3, {"lora": {"init": "olora"}}, "init: olora at ZeRO-3: it decomposes whole weights"),
        (3, {"train": {"label_smoothing": 0.1, "loss_chunk": None}}, "train.label_smoothing at ZeRO-3"),
        (3, {"train": {"label_smoothing": 0.1}}, None),
        (1, {"tune": {"method": "full", "freeze": {"first": 1, "unfreeze_every": 2}}}, "tune.freeze.unfreeze_every under DeepSpeed ZeRO-1: its optimizer lays all trained weights out once"),
        (0, {"tune": "qlora"}, "quantization: nf4 needs an NVIDIA GPU and this run is on cpu; use method: lora"),
        (2, {"lora": {"dora": True}}, None),
        (3, {"tune": {"method": "full", "freeze": {"first": 1}}}, None),
        (3, {"tune": "ia3"}, None),
    ],
)
def test_what_can_not_be_trained_here_is_said_before_anything_is_loaded(monkeypatch, zero, changes, message):
    monkeypatch.setattr(possible, "zero_stage", lambda: zero)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cfg = SFTStage.model_validate(SFT | changes)
    if message is None:
        possible.check(cfg)
    else:
        with pytest.raises(UserError, match=message):
            possible.check(cfg)


def test_4_bits_on_a_gpu_without_the_package_name_the_extra(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("configs.extras.find_spec", lambda _: None)
    with pytest.raises(MissingExtra, match="quantization"):
        possible.check(SFTStage.model_validate(SFT | {"tune": "qlora"}))
