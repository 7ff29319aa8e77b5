"""Files of weights: grouped so that frozen parts stay identical, read by every loader, few even for deep models."""

import json
import re
import shutil

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaForCausalLM

from stages import models, shards
from stages.registry import Registry
from stages.registry.sizes import real_sizes
from tests.reliability import shared
from tests.tiny import tiny_config, tiny_model, tiny_tokenizer

# hidden, feed-forward, key/value width, layers, vocabulary, whether the head is the embedding: published configs
SHAPES = {
    "Llama-3-70B": (8192, 28672, 1024, 80, 128256, False), "Llama-3-8B": (4096, 14336, 1024, 32, 128256, False),
    "Qwen2.5-0.5B": (896, 4864, 128, 24, 151936, True), "Mistral-7B": (4096, 14336, 1024, 32, 32000, False),
}  # fmt: skip


def unchanged(sizes, changed):
    """Share of the bytes in files none of whose tensors match `changed`."""
    kept = [names for names in shards.split(sizes).values() if not any(re.search(changed, name) for name in names)]
    return sum(sizes[name] for names in kept for name in names) / sum(sizes.values())


@pytest.mark.parametrize("name", SHAPES)
def test_few_files_for_any_size_and_what_adapters_and_frozen_layers_leave_alone_is_shared(name):
    sizes = shared.llama_tensors(*SHAPES[name])
    files = shards.split(sizes)
    assert sorted(tensor for names in files.values() for tensor in names) == sorted(sizes)
    assert 10 < len(files) <= 2 * 8 + 32 + 3
    assert max(sum(sizes[tensor] for tensor in names) for names in files.values()) <= shards.LARGEST
    assert unchanged(sizes, r"[qv]_proj") >= 0.85
    assert unchanged(sizes, r"[qkvo]_proj") >= 0.7
    depth = SHAPES[name][3]
    trained = "|".join(str(layer) for layer in range(depth * 3 // 4, depth))
    assert unchanged(sizes, rf"layers\.({trained})\.") >= 0.7


def test_eight_layers_by_hand():
    # per layer 1 of q and v, 1 of k and o, 1 of MLP and norms; embeddings, head, last norm: 8 * 3 + 3
    files = shards.split(shared.llama_tensors(512, 1024, 256, 8, 5000, False))
    assert next(iter(files)) == "model-00001-of-00027.safetensors"
    assert files["model-00001-of-00027.safetensors"] == ["model.embed_tokens.weight"]
    assert [re.sub(r"model\.layers\.|\.weight", "", name) for file in list(files)[1:4] for name in files[file]] == [
        "0.self_attn.q_proj", "0.self_attn.v_proj", "0.self_attn.k_proj", "0.self_attn.o_proj",
        "0.input_layernorm", "0.mlp.down_proj", "0.mlp.gate_proj", "0.mlp.up_proj", "0.post_attention_layernorm",
    ]  # fmt: skip
    assert [files[file] for file in list(files)[-2:]] == [["lm_head.weight"], ["model.norm.weight"]]


def test_other_architectures_names_and_what_was_laid_out_before():
    sizes = {f"transformer.h.{layer}.{name}": 2**22 for layer in range(2) for name in ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight")}
    sizes |= {"transformer.wte.weight": 2**22, "transformer.ln_f.weight": 4}
    assert [len(names) for names in shards.split(sizes).values()] == [1] * 8
    experts = {f"model.layers.0.mlp.experts.{number}.w1.weight": 2**20 for number in range(8)}
    assert list(shards.split(experts).values()) == [sorted(experts)]
    assert shards.split(experts) == {"model.safetensors": sorted(experts)}
    before = {name: "a" if ".h.0." in name else "b" for name in sizes if "ln_f" not in name}
    assert [len(names) for names in shards.split(sizes, before).values()] == [1, 3, 4]  # a new tensor has a file of its own
    assert shards.split({"a": 10, "b": 20}) == {"model.safetensors": ["a", "b"]}  # small


def test_a_group_larger_than_a_file_may_be_is_cut(monkeypatch):
    monkeypatch.setattr(shards, "LARGEST", 2**23)
    sizes = {f"model.layers.0.mlp.experts.{number}.w1.weight": 2**22 for number in range(5)} | {"model.layers.0.mlp.gate.weight": 3 * 2**22}
    assert [sum(sizes[name] for name in names) / 2**22 for names in shards.split(sizes).values()] == [2, 2, 1, 3]


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """A registry with a base of 8 layers and what was made of it: split as large models are, though it is small. RELIABILITY.md has those that are not."""
    registry = Registry(tmp_path_factory.mktemp("shards") / "registry")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SINGLE", 0)
        return registry, *made_of_a_base(registry)


def made_of_a_base(registry):
    parent = shared.base(registry, layers=8, hidden=48, intermediate_size=168, num_key_value_heads=1)  # the proportions of Llama 3
    frozen = shared.frozen(registry, parent, (3, 6))
    adapter, merged = shared.merged(registry, parent, ["q_proj", "v_proj"])
    return parent, frozen, adapter, merged


def test_a_child_with_frozen_layers_or_a_merged_adapter_shares_its_bytes(family):
    registry, parent, frozen, _, merged = family
    assert (parent.model_dir / shards.INDEX).is_file()
    assert shared.shared_with(frozen, parent) >= 0.7
    assert shared.shared_with(merged, parent) >= 0.85
    assert all(registry.verify(item.id, deep=True) == [] for item in registry.list())
    sizes = real_sizes([parent, frozen, merged])
    assert sizes[parent.id] == parent.size
    assert sizes[frozen.id] == round(frozen.size * (1 - shared.shared_with(frozen, parent)))
    assert real_sizes([frozen])[frozen.id] == frozen.size


def test_an_adapter_checkpoint_never_stores_its_base(family):
    _, parent, _, adapter, _ = family
    weights = [name for name in adapter.manifest["files"] if name.endswith((".safetensors", ".bin"))]
    assert weights == ["model/adapter_model.safetensors"]
    with safe_open(adapter.path / weights[0], "pt") as file:
        assert all("lora_" in name for name in file.keys())  # noqa: SIM118 - safetensors has no iteration
    assert adapter.manifest["files"][weights[0]]["size"] < parent.size / 10


def test_plain_from_pretrained_reads_the_files(family):
    registry, parent, frozen, _, merged = family
    for checkpoint in (parent, frozen, merged):
        model, problems = AutoModelForCausalLM.from_pretrained(checkpoint.model_dir, output_loading_info=True)
        assert not any(problems.values())
        index = json.loads((checkpoint.model_dir / shards.INDEX).read_text())
        assert set(index["weight_map"].values()) == {path.name for path in checkpoint.model_dir.glob("*.safetensors")}
        assert index["metadata"]["total_size"] == sum(parameter.numel() * 4 for parameter in model.parameters())
    ours = models.load_policy(shared.origin(registry, merged)).state_dict()
    again = models.load_policy(shared.origin(registry, family[3])).state_dict()
    assert all(torch.equal(ours[name], again[name]) for name in ours)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [True, False])
def test_identical_weights_give_identical_files_in_every_precision(tmp_path, dtype, tied):
    model = LlamaForCausalLM(tiny_config(layers=3, hidden=64, tie_word_embeddings=tied)).to(dtype)
    for folder, state in (("a", None), ("b", {name: tensor.clone() for name, tensor in reversed(model.state_dict().items())})):
        models.save_model(model, tiny_tokenizer(), tmp_path / folder, eos_ids=[258], **({} if state is None or tied else {"state_dict": state}))
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "b").iterdir())
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in files)
    again = LlamaForCausalLM.from_pretrained(tmp_path / "a", dtype="auto")
    assert again.dtype == dtype
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), again.parameters(), strict=True))


def test_a_reward_model_shares_its_trunk_with_the_policy_it_was_made_from(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SINGLE", 0)
    registry = Registry(tmp_path / "registry")
    parent = shared.base(registry, layers=4, hidden=64)
    policy = models.load_policy(shared.origin(registry, parent))
    scorer = models.scorer_from_policy(policy, pad_id=256, seed=0)
    child = shared.publish(registry, "reward/r", scorer, [], like=shared.origin(registry, parent))
    assert shared.shared_with(child, parent) >= 0.9
    again, problems = AutoModelForSequenceClassification.from_pretrained(child.model_dir, output_loading_info=True)
    assert not any(problems.values())
    assert torch.equal(again.score.weight, scorer.score.weight)


def test_the_layout_of_a_checkpoint_is_kept_and_that_of_a_folder_from_outside_is_not(tmp_path):
    registry = Registry(tmp_path / "registry")
    folder = tiny_model(tmp_path / "outside", layers=8, hidden=64)
    LlamaForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="200KB")
    (folder / "model.safetensors").unlink()
    older = registry.publish("sft", "older", lambda to: shutil.copytree(folder, to, dirs_exist_ok=True))  # as imports were
    under, outside = shared.origin(registry, older), models.Origin(str(folder), None, None)
    child = shared.publish(registry, "sft/child", models.load_policy(under), [], like=under)
    assert {path.name for path in child.model_dir.glob("*.safetensors")} == {path.name for path in folder.glob("*.safetensors")}
    assert shards.layout_of(child.model_dir) == shards.layout_of(folder)
    child = shared.publish(registry, "sft/child", models.load_policy(outside), [], like=outside)
    assert [path.name for path in child.model_dir.glob("*.safetensors")] == ["model.safetensors"]  # it is small


def test_what_a_dozen_more_files_would_cost_more_than_they_could_share_stays_one_file():
    """A model of 1 MB became 17 files."""
    small, large = (shared.llama_tensors(hidden, 4 * hidden, hidden, 4, 1024, True) for hidden in (64, 512))
    assert sum(small.values()) < 2**20 < shards.SINGLE < sum(large.values())
    assert len(shards.split(small)) == 1
    assert len(shards.split(large)) == 4 * 3 + 2


def test_a_tiny_model_stays_one_file(tmp_path):
    models.save_model(LlamaForCausalLM(tiny_config()), tiny_tokenizer(), tmp_path / "m", eos_ids=[258])
    assert [path.name for path in (tmp_path / "m").glob("model*")] == ["model.safetensors"]
