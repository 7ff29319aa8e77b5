"""What training left alone is written as its parent has it, whatever format that is; what it changed keeps every bit."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from stages import models, shards, unchanged
from stages.registry import Registry
from stages.registry.regrouping import regroup
from tests.reliability import shared
from tests.tiny import tiny_config, tiny_tokenizer

HALVES = [torch.bfloat16, torch.float16]


def test_numbers_are_compared_to_the_bit_across_formats(monkeypatch):
    monkeypatch.setattr(unchanged, "CHUNK", 3)
    numbers = torch.tensor([[1.5, -2.0, 0.0, 2.0**-14], [3.0, 4.0, 5.0, 6.0]])  # all of them in every format
    formats = [numbers.to(dtype) for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)]
    assert all(unchanged.same_numbers(one, other) for one in formats for other in formats)
    last = numbers.clone()
    last[1, 3] = torch.nextafter(last[1, 3], torch.tensor(7.0))
    assert not unchanged.same_numbers(last, formats[2])
    assert not unchanged.same_numbers(torch.tensor([0.0]), torch.tensor([-0.0]).bfloat16())
    assert not unchanged.same_numbers(torch.tensor([1]), torch.tensor([1]))


def dtypes(folder):
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            found |= {name: opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118 - safetensors has no iteration
    return found


@pytest.fixture(params=HALVES, ids=["bf16", "fp16"])
def family(tmp_path, monkeypatch, request):
    """A base in 16 bits of 8 layers, split as large models are; a child of which two layers were trained; a merged adapter."""
    monkeypatch.setattr(shards, "SINGLE", 0)
    registry = Registry(tmp_path / "registry")
    parent = shared.base(registry, dtype=request.param, layers=8, hidden=48, intermediate_size=168, num_key_value_heads=1)
    return registry, parent, request.param


def test_frozen_layers_of_a_base_in_16_bits_are_its_files_and_trained_ones_keep_float32(family):
    registry, parent, _ = family
    trained = models.load_policy(shared.origin(registry, parent))
    torch.manual_seed(5)
    shared.step(trained, lambda name: "layers.3." in name or "layers.6." in name)
    child = shared.publish(registry, "sft/frozen", trained, [], like=shared.origin(registry, parent))
    kinds = {name: kind == "F32" for name, kind in dtypes(child.model_dir).items()}
    assert kinds == {name: "layers.3." in name or "layers.6." in name for name in kinds}
    assert shared.taken_over(child, parent) >= 0.7
    again = models.load_policy(shared.origin(registry, child))
    assert all(torch.equal(one, other) for one, other in zip(trained.state_dict().values(), again.state_dict().values(), strict=True))
    index = json.loads((child.model_dir / shards.INDEX).read_text())["metadata"]
    assert index["total_size"] == sum(tensor.numel() * tensor.element_size() for file in child.model_dir.glob("*.safetensors") for tensor in load_file(file).values())
    assert index["total_parameters"] == trained.num_parameters()
    assert registry.verify(child.id, deep=True) == []


def test_plain_from_pretrained_and_peft_read_mixed_formats(family):
    from peft import LoraConfig, get_peft_model

    registry, parent, dtype = family
    child = shared.frozen(registry, parent, (2,))
    assert len(set(dtypes(child.model_dir).values())) == 2
    ours = models.load_policy(shared.origin(registry, child)).state_dict()
    for asked in ({}, {"dtype": "auto"}, {"dtype": torch.float32}):
        model, problems = AutoModelForCausalLM.from_pretrained(child.model_dir, output_loading_info=True, **asked)
        assert not any(problems.values())
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}, asked
        assert all(torch.equal(value, ours[name]) for name, value in model.state_dict().items())
    half = AutoModelForCausalLM.from_pretrained(child.model_dir, dtype=dtype)
    assert all(torch.equal(value, ours[name].to(dtype)) for name, value in half.state_dict().items())
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(child.model_dir, dtype="auto"), LoraConfig(r=2, target_modules=["q_proj"]))
    ids = torch.arange(6)[None]
    plain = AutoModelForCausalLM.from_pretrained(child.model_dir, dtype="auto")
    assert torch.equal(adapted(input_ids=ids).logits, plain(input_ids=ids).logits)


def test_a_merged_adapter_shares_what_lies_under_it_and_children_of_children_share_all_of_that(family):
    registry, parent, _ = family
    adapter, merged = shared.merged(registry, parent, ["q_proj", "v_proj"])
    assert shared.taken_over(merged, parent) >= 0.85
    kinds = dtypes(merged.model_dir)
    assert {name for name, kind in kinds.items() if kind == "F32"} == {name for name in kinds if "q_proj" in name or "v_proj" in name}
    child = shared.frozen(registry, merged, (7,))
    assert shared.shared_with(child, merged) >= 0.7
    again = models.load_policy(shared.origin(registry, merged)).state_dict()
    apart = models.load_policy(shared.origin(registry, adapter)).state_dict()
    assert all(torch.equal(again[name], apart[name]) for name in apart)


def test_a_new_head_on_the_trunk_and_grown_embeddings_are_float32(family):
    registry, parent, _ = family
    policy = models.load_policy(shared.origin(registry, parent))
    models.resize_to(policy, 300)
    scorer = models.scorer_from_policy(policy, pad_id=256, seed=0)
    child = shared.publish(registry, "reward/r", scorer, [], like=shared.origin(registry, parent))
    kinds = dtypes(child.model_dir)
    assert {name for name, kind in kinds.items() if kind == "F32"} == {"model.embed_tokens.weight", "score.weight"}
    again = models.load_scorer(shared.origin(registry, child))
    assert all(torch.equal(value, scorer.state_dict()[name]) for name, value in again.state_dict().items())


@pytest.mark.parametrize("tied", [True, False])
def test_one_small_file_of_both_formats(tmp_path, tied):
    registry = Registry(tmp_path / "registry")
    parent = shared.base(registry, dtype=torch.bfloat16, tie_word_embeddings=tied)
    child = shared.frozen(registry, parent, (1,))
    assert [path.name for path in child.model_dir.glob("*.safetensors")] == ["model.safetensors"]
    kinds = dtypes(child.model_dir)
    assert ("lm_head.weight" in kinds) is not tied
    assert {name for name, kind in kinds.items() if kind == "F32"} == {name for name in kinds if "layers.1." in name}
    again = models.load_policy(shared.origin(registry, child))
    assert again.get_input_embeddings().weight.data_ptr() == again.get_output_embeddings().weight.data_ptr() if tied else True


@pytest.mark.parametrize("harm", ["removed", "cut", "flipped"])
def test_a_parent_that_was_lost_costs_room_and_not_the_model(tmp_path, harm):
    """Training is over when this is read."""
    folder = tmp_path / "outside"
    LlamaForCausalLM(tiny_config()).to(torch.bfloat16).save_pretrained(folder)
    outside = models.Origin(str(folder), None, None)
    model = models.load_policy(outside)
    file = folder / "model.safetensors"
    content = file.read_bytes()
    file.unlink()
    if harm != "removed":
        file.write_bytes(content[:-5] if harm == "cut" else content[:-1] + bytes([content[-1] ^ 1]))
    models.save_model(model, tiny_tokenizer(), tmp_path / "child", eos_ids=[258], like=outside)
    written = models.load_policy(models.Origin(str(tmp_path / "child"), None, None))
    assert all(torch.equal(one, other) for one, other in zip(model.state_dict().values(), written.state_dict().values(), strict=True))
    assert len([kind for kind in dtypes(tmp_path / "child").values() if kind == "F32"]) == (1 if harm == "flipped" else len(dtypes(tmp_path / "child")))


def test_a_hub_name_is_looked_for_in_the_cache(tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda name, file: str(tmp_path / file) if name == "org/there" else None)
    assert unchanged.weights_under(models.Origin("org/there", None, None)) == tmp_path
    assert unchanged.weights_under(models.Origin("org/absent", None, None)) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_files_of_the_hub_become_those_that_a_stage_would_write(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(shards, "SINGLE", 0)
    model = LlamaForCausalLM(tiny_config(layers=3)).to(dtype)
    models.save_model(model, tiny_tokenizer(), tmp_path / "ours", eos_ids=[258])
    names = sorted(name for name in model.state_dict() if name != "lm_head.weight")
    (tmp_path / "hub").mkdir()
    for number, part in enumerate((names[:7], names[7:])):
        save_file({name: model.state_dict()[name] for name in part}, tmp_path / "hub" / f"{number}.safetensors", metadata={"origin": "elsewhere"})
    (tmp_path / "new").mkdir()
    assert regroup([tmp_path / "hub" / "0.safetensors", tmp_path / "hub" / "1.safetensors"], tmp_path / "new")
    assert shards.layout_of(tmp_path / "new") == shards.layout_of(tmp_path / "ours")
    for file in {*shards.layout_of(tmp_path / "ours").values()}:
        assert (tmp_path / "new" / file).read_bytes() == (tmp_path / "ours" / file).read_bytes()
