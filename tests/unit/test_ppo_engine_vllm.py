"""The vLLM engine against a stand-in (tests/unit/fake_vllm.py), through TRL's real VLLMGeneration. No real vLLM has run this code."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from peft import get_peft_model

from configs.errors import UserError
from configs.schema import VLLM, Lora
from stages.ppo.engines.vllm import PlainWeights, VLLMEngine
from stages.ppo.modules import POLICY, VALUE, AdapterSwitch
from stages.tuning.adapters import lora_config
from tests.unit import fake_vllm
from tests.unit.ppo_samples import model_of, ragged_ids
from tests.unit.test_ppo_engines import largest_gap, policy_of

SERVER = VLLM(mode="server", url="http://127.0.0.1:8000")
COLOCATED = VLLM(gpu_memory=0.2)


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A model in a folder, with vLLM's stand-in where TRL and we look for vLLM."""
    made = model_of(spread=0.15)
    made.save_pretrained(tmp_path)
    made.name_or_path = str(tmp_path)
    fake_vllm.install(monkeypatch, made)
    return made


def engine_of(policy, cfg):
    engine = VLLMEngine(policy, cfg, Accelerator(cpu=True), tokenizer=None)
    engine.sync()
    return engine


def with_adapters(model):
    """Policy and value adapters on one backbone, both far from zero."""
    peft_model = get_peft_model(model, lora_config(Lora(rank=4, alpha=8), "CAUSAL_LM"), adapter_name=POLICY)
    peft_model.add_adapter(VALUE, lora_config(Lora(rank=4, alpha=8), "CAUSAL_LM"))
    backbone = peft_model.get_base_model().eval()
    AdapterSwitch(backbone, [POLICY, VALUE])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return backbone


@pytest.mark.parametrize("cfg", [COLOCATED, VLLM(sleep=False), SERVER], ids=["colocate", "awake", "server"])
@pytest.mark.parametrize("lora", [False, True])
def test_row_8_it_samples_from_the_weights_of_the_last_sync(model, cfg, lora):
    """Before and after a change of the policy: log-probs are those of the policy's forward, ragged, at a temperature, any EOS."""
    policy, (prompts, _) = policy_of(with_adapters(model) if lora else model, eos=(2, 9, 30), temperature=0.7, seed=3), ragged_ids(24)
    engine = engine_of(policy, cfg)
    first = engine.sample(prompts, iteration=0, indices=range(24))
    assert largest_gap(policy, prompts, first) < 1e-5
    assert {s.completion_ids[-1] for s in first if s.finished} == {2, 9, 30}
    assert engine.sample(prompts, iteration=0, indices=range(24)) == first, "again without a sync: weights that slept are fetched again"
    assert engine.sample(prompts, iteration=1, indices=range(24)) != first
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if not lora or f"lora_B.{POLICY}" in name:
                parameter.mul_(1.5)
    if not (cfg.mode == "colocate" and cfg.sleep):
        assert largest_gap(policy, prompts, engine.sample(prompts, iteration=0, indices=range(24))) > 0.05, "without a sync it has the old weights"
    engine.sync()
    assert largest_gap(policy, prompts, engine.sample(prompts, iteration=0, indices=range(24))) < 1e-5


def test_row_22_completions_of_one_prompt_differ_and_do_not_depend_on_the_share(model):
    """One seed for the whole call would give every completion of a prompt the same tokens."""
    policy = policy_of(model)
    engine = engine_of(policy, SERVER)
    rows = engine.sample([[5, 6]] * 40, iteration=0, indices=range(40))
    assert len({tuple(s.completion_ids) for s in rows}) > 20
    assert engine.sample([[5, 6]] * 20, iteration=0, indices=range(20, 40)) == rows[20:]


def test_row_5_fixed_length(model):
    rows = engine_of(policy_of(model, stop_at_eos=False), COLOCATED).sample([[5, 6]] * 20, iteration=0, indices=range(20))
    assert {len(s.completion_ids) for s in rows} == {12}
    assert all(s.finished for s in rows)


def test_the_settings_that_reach_vllm(model):
    policy = policy_of(model, generate_batch_size=5)
    colocated = engine_of(policy, COLOCATED).generation.llm
    assert colocated.settings["gpu_memory_utilization"] == 0.2
    assert colocated.settings["enable_sleep_mode"] is True
    assert colocated.settings["max_num_seqs"] == 5
    assert colocated.settings["model"] == model.name_or_path
    assert colocated.resets == 1, "cached prefixes belong to the old weights"
    engine = engine_of(policy, SERVER)
    assert engine.generation.vllm_client.base_url == SERVER.url
    assert engine.generation.vllm_client.resets == 1
    engine.sample([[5, 6]] * 7, iteration=0, indices=range(7))
    assert engine.generation.vllm_client.asked == 7, "a request, and a seed, for each completion"


def test_merging_for_vllm_leaves_the_backbone_as_it_was(model):
    """To the bit: the reference and the reward model live on the same weights."""
    plain = {name: p.clone() for name, p in model.named_parameters()}
    backbone = with_adapters(model)
    before = {name: p.detach().clone() for name, p in backbone.named_parameters()}
    merged = dict(PlainWeights(backbone).named_parameters())
    assert set(merged) == set(plain), "the names of the architecture, without the adapters"
    assert all(torch.equal(before[name], p) for name, p in backbone.named_parameters())
    changed = {name for name in plain if not torch.equal(merged[name], plain[name])}
    assert changed
    assert all("proj" in name for name in changed), "embeddings, norms and the head carry no adapter"


def test_weights_that_can_not_be_carried_over_are_refused(model):
    policy = policy_of(model)
    model.resize_token_embeddings(40)
    with pytest.raises(UserError, match=r"has 32 tokens, and the policy has 40"):
        engine_of(policy, COLOCATED)
    packed = model_of()
    packed.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(UserError, match=r"quantised weights \(model.layers.0.mlp.up_proj.weight\)"):
        engine_of(policy_of(packed), COLOCATED)
