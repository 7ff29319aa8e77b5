"""Models from outside become checkpoints that the stages start from."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from configs.errors import UserError
from launch.cli import main
from stages import models
from stages.registry import Registry, resumable
from stages.registry.importing import Source, _inside, import_model, licence_of
from stages.registry.leases import leases_of
from stages.tokens import load_tokens
from stages.training import saves
from tests.stage.runs import run, settings, workspace
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    return workspace(tmp_path_factory.mktemp("import"), rows=40)


@pytest.fixture
def registry(tmp_path):
    return Registry(tmp_path / "registry")


def origin(registry, checkpoint):
    return models.Origin(checkpoint.ref, checkpoint, registry)


def test_a_folder_is_imported_with_its_facts_and_its_weights_as_they_are(there, registry, tmp_path, capsys):
    source = shutil.copytree(there / "base", tmp_path / "source")
    (source / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    (source / "modeling_x.py").write_text("raise SystemExit('run')")
    (source / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}}))
    assert main(["registry", "import", str(source), "--as", "sft/base", "--registry", str(registry.root), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    checkpoint = registry.resolve("sft/base", deep=True)
    assert (facts["ref"], facts["id"]) == ("sft/base@1", checkpoint.id)
    assert sorted(os.listdir(checkpoint.model_dir)) == ["chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert (checkpoint.model_dir / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    assert "auto_map" not in json.loads((checkpoint.model_dir / "config.json").read_text())
    tokens = load_tokens(origin(registry, checkpoint))
    assert (tokens.facts["pad_id"], tokens.facts["eos_ids"], checkpoint.info("licence")) == (256, [258], "apache-2.0")
    assert checkpoint.manifest["parents"][0]["source"] == str(source)
    assert "[external]" in registry.lineage("sft/base").render()


def test_pad_that_is_eos_is_mended_and_the_import_is_the_parent_of_a_reward_model(there):
    """A tokenizer whose only special token is its EOS: the pad is new, and has a row of the embeddings."""
    from transformers import AutoTokenizer

    source = shutil.copytree(there / "base", there / "pad-is-eos")
    tokenizer = AutoTokenizer.from_pretrained(source)
    content = json.loads((source / "tokenizer.json").read_text())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] == "<eos>"]
    (source / "tokenizer.json").write_text(json.dumps(content))
    settings_file = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": settings_file["tokenizer_class"], "eos_token": "<eos>", "pad_token": "<eos>"}))
    assert len(tokenizer) == 259
    notes = []
    registry = Registry(there / "registry")
    checkpoint = import_model(registry, str(source), "sft/mended", say=notes.append)
    assert any("is also an EOS" in note for note in notes)
    facts = checkpoint.info("tokenizer")
    assert facts["pad_id"] not in facts["eos_ids"]
    rows = load_file(checkpoint.model_dir / "model.safetensors")["model.embed_tokens.weight"].shape[0]
    assert rows > facts["pad_id"]
    train = {"epochs": 1, "batch_size": 8, "micro_batch_size": 8, "eval_every": 50, "save_every": 2}
    made = run("reward", settings(there, "reward", train, init_from="sft/mended", keep_resume=True))
    assert not (there / "out-reward" / "resume").exists()
    assert registry.verify(made.id, deep=True) == []  # the kept save is no part of the checkpoint
    save = resumable.restore(registry, made.ref, there / "again")
    assert (saves.problem(save), save.parent) == (None, there / "again" / "resume")
    assert made.manifest["parents"][0]["id"] == checkpoint.id
    (lease,) = leases_of(registry.root, checkpoint.id)  # held until the process ends
    assert (lease.purpose, lease.holder.pid) == ("reward/tiny trains from it", os.getpid())


def test_a_reward_model_and_its_refusals(there, registry, tmp_path):
    policy = models.load_policy(models.Origin(str(there / "base"), None, None))
    scorer = models.scorer_from_policy(policy, pad_id=256, seed=0)
    source = tmp_path / "rm"
    scorer.save_pretrained(source)
    load_tokens(models.Origin(str(there / "base"), None, None)).tokenizer.save_pretrained(source)
    with pytest.raises(UserError, match=r"is a …ForSequenceClassification: it can't be a checkpoint of stage sft; import it as reward/NAME"):
        import_model(registry, str(source), "sft/rm")
    with pytest.raises(UserError, match=r"is a …ForCausalLM: it can't be a checkpoint of stage reward"):
        import_model(registry, str(there / "base"), "reward/rm")
    checkpoint = import_model(registry, str(source), "reward/rm")
    from stages.scorers import reward_scorer

    score = reward_scorer("reward/rm", registry.root)
    (value,) = score(["say fig"], ["yes fig"])
    tokens = load_tokens(origin(registry, checkpoint))
    ids = torch.tensor([tokens.formatter.prompt_ids("say fig") + tokens.formatter.completion_ids("yes fig", "say fig")])
    assert value == pytest.approx(scorer(input_ids=ids).logits.item(), abs=1e-5)
    tensors = load_file(source / "model.safetensors")
    save_file(tensors | {"score.weight": torch.zeros(3, 32)}, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="a head `score` with 3 outputs"):
        import_model(registry, str(source), "reward/rm")


def adapter_on(there, folder, base, **changes):
    """A LoRA adapter as peft writes it, and the model it was made from."""
    from peft import LoraConfig, get_peft_model

    model = models.load_policy(models.Origin(str(base), None, None))
    torch.manual_seed(1)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False))
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(folder)
    return adapted


def test_an_adapter_is_put_on_its_base_and_refused_on_another(there, registry, tmp_path):
    adapted = adapter_on(there, tmp_path / "adapter", there / "base")
    base = import_model(registry, str(there / "base"), "sft/base")
    checkpoint = import_model(registry, str(tmp_path / "adapter"), "sft/lora", base="sft/base")
    assert [entry.get("id") for entry in checkpoint.manifest["parents"]] == [None, base.id]
    loaded = models.load_policy(origin(registry, checkpoint))
    ids = torch.arange(20)[None]
    assert torch.allclose(loaded(input_ids=ids).logits, adapted(input_ids=ids).logits, atol=1e-5)
    outside = import_model(registry, str(tmp_path / "adapter"), "sft/outside")
    assert outside.info("stage_info")["adapter"]["base"] == str(there / "base")
    tiny_model(tmp_path / "wide", hidden=48)
    with pytest.raises(UserError, match=r"changes the layer model\.layers\.0\.self_attn\.q_proj, which .* has with 48 inputs, not 32"):
        import_model(registry, str(tmp_path / "adapter"), "sft/lora", base=str(tmp_path / "wide"))
    with pytest.raises(UserError, match=r"is an adapter on sft/none: .*Give the base with --base"):
        import_model(registry, str(tmp_path / "adapter"), "sft/lora", base="sft/none")
    with pytest.raises(UserError, match="holds whole weights, no adapter"):
        import_model(registry, str(there / "base"), "sft/lora", base="sft/base")


def _pickle_only(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _no_weights(folder):
    (folder / "model.safetensors").unlink()


def _torn(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-7])


def _link_out(folder):
    (folder.parent / "elsewhere.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(folder.parent / "elsewhere.safetensors")


def _index_out(folder):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../x.safetensors"}}))


def _index_of_more(folder):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lost.weight": "model.safetensors"}}))


def _no_config(folder):
    (folder / "config.json").unlink()


def _broken_config(folder):
    (folder / "config.json").write_text("{")


def _vision(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForTokenClassification"]}))


def _not_finite(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (_pickle_only, r"holds no model\.safetensors .*Its weights are pickles \(pytorch_model\.bin\).*convert them"),
        (_no_weights, r"holds no model\.safetensors .*Get the weights"),
        (_torn, "not a whole safetensors file"),
        (_link_out, r"model\.safetensors is a link out of its folder"),
        (_index_out, "weight_map must give a file name"),
        (_index_of_more, "names 1 tensors that no file holds, such as 'lost.weight'"),
        (_no_config, "holds neither config.json nor adapter_config.json"),
        (_broken_config, r"config\.json: cannot be read"),
        (_vision, "is a LlamaForTokenClassification; a stage can start from a …ForCausalLM"),
        (_not_finite, "1 of the numbers in tensor 'model.norm.weight'"),
    ],
)
def test_what_cannot_be_imported_is_refused_with_a_remedy_and_nothing_is_published(there, registry, tmp_path, break_it, message):
    source = shutil.copytree(there / "base", tmp_path / "source")
    break_it(source)
    with pytest.raises(UserError, match=message):
        import_model(registry, str(source), "sft/base")
    assert registry.list() == []
    assert not (registry.root / "checkpoints").exists() or os.listdir(registry.root / "checkpoints") == []


@pytest.mark.parametrize(("asked", "family", "message"), [
    ("BASE", "base", "expected STAGE/NAME with one of the stages sft, reward, dpo, ppo"),
    ("BASE", "merged/base", "expected STAGE/NAME with one of the stages"),
    ("BASE", "sft/Base", "not a usable name"),
    ("../nowhere", "sft/base", "no such folder, and no name on the hub"),
    ("org/model", "sft/base", "can't be had from the hub: .*without network: download it elsewhere"),
])  # fmt: skip
def test_names_and_places_that_are_none(there, registry, asked, family, message):
    with pytest.raises(UserError, match=message):
        import_model(registry, str(there / "base") if asked == "BASE" else asked, family)


def test_a_card_without_a_licence_names_none(tmp_path):
    assert licence_of(tmp_path) is None
    (tmp_path / "README.md").write_text("# no front matter\n")
    assert licence_of(tmp_path) is None


def test_a_merged_export_is_a_model_of_its_own_and_says_how_far_it_is_from_the_adapter(there, registry, tmp_path, capsys):
    adapter_on(there, tmp_path / "adapter", there / "base")
    import_model(registry, str(there / "base"), "sft/base")
    checkpoint = import_model(registry, str(tmp_path / "adapter"), "sft/lora", base="sft/base")

    def exported(*words):
        assert main(["registry", "export", "sft/lora", str(tmp_path / words[0]), "--registry", str(registry.root), *words[1:]]) == 0
        return tmp_path / words[0], capsys.readouterr()

    apart, told = exported("apart")
    assert json.loads((apart / "adapter_config.json").read_text())["base_model_name_or_path"] == "sft/base"
    assert "this is an adapter on sft/base, which whoever loads it must have" in told.err
    back = import_model(registry, str(apart), "sft/back")  # its base is a name of the registry, which transformers can't load
    assert back.info("stage_info")["adapter"]["base_id"] == registry.resolve("sft/base").id
    merged, told = exported("merged", "--merge", "--json")
    assert {oct(path.stat().st_mode & 0o444) for path in merged.iterdir()} == {oct(merged.stat().st_mode & 0o444)}
    difference = json.loads(told.out)["difference"]
    assert 0 <= difference < 1e-4
    assert f"over 8 prompts the largest difference of logits is {difference:.3g}" in told.err
    assert f"largest difference between merged and unmerged logits is {difference:.3g}" in (merged / "README.md").read_text()
    from transformers import AutoModelForCausalLM

    ids = torch.arange(20)[None]
    expected = models.load_apart(origin(registry, checkpoint))(input_ids=ids).logits
    assert torch.allclose(AutoModelForCausalLM.from_pretrained(merged)(input_ids=ids).logits, expected, atol=1e-4)
    assert not (merged / "adapter_config.json").exists()
    half, told = exported("half", "--merge", "--dtype", "bfloat16", "--json")
    assert json.loads(told.out)["difference"] > 10 * difference  # rounding shows, so the figure is one of the files
    assert load_file(half / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16
    again = import_model(registry, str(merged), "sft/merged")
    assert registry.verify(again.id, deep=True) == []


def test_a_link_to_a_download_of_the_hub_is_one(tmp_path):
    """Snapshots hold links into blobs, and people link to snapshots."""
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "abc", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "123").write_text("weights")
    (snapshot / "model.safetensors").symlink_to("../../blobs/123")
    (tmp_path / "mine").symlink_to(snapshot)
    for folder in (snapshot, tmp_path / "mine"):
        assert _inside(folder, "model.safetensors", Source("mine", folder)) == blobs / "123"
    (snapshot / "secret").symlink_to("/etc/hostname")
    with pytest.raises(UserError, match="a link out of its folder"):
        _inside(tmp_path / "mine", "secret", Source("mine", tmp_path / "mine"))
