"""Real runs from an imported base in bfloat16: what they leave alone is stored once, and the model is the one that was trained."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from stages import models, shards
from stages.registry import Registry
from stages.registry.exporting import Options, export
from stages.registry.importing import import_model
from tests.reliability.shared import taken_over
from tests.stage.runs import run, settings, workspace

FREEZE = {"method": "full", "freeze": {"first": 3, "embeddings": True}}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A registry with sft/half, in bfloat16, and sft/single, the same numbers in float32: both split as large models are."""
    folder = workspace(tmp_path_factory.mktemp("unchanged"), layers=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SINGLE", 0)
        for name, dtype in (("half", torch.bfloat16), ("single", torch.float32)):
            model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16).to(dtype)
            model.save_pretrained(folder / name)
            AutoTokenizer.from_pretrained(folder / "base").save_pretrained(folder / name)
            import_model(Registry(folder / "registry"), str(folder / name), f"sft/{name}", template="plain")
        yield folder


def resolved(place, ref):
    registry = Registry(place / "registry")
    checkpoint = registry.resolve(ref)
    assert registry.verify(checkpoint.id, deep=True) == []
    return registry, checkpoint


def loaded(place, ref):
    registry, checkpoint = resolved(place, ref)
    return models.load_policy(models.Origin(checkpoint.ref, checkpoint, registry)).state_dict()


def trained(place, stage, base, name, **changes):
    run(stage, settings(place, stage, {"max_steps": 2}, name=name, output=str(place / f"out-{name}"), init_from=base, **changes))
    return resolved(place, f"{stage}/{name}")[1]


def in_bf16(checkpoint):
    found = {}
    for file in checkpoint.model_dir.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            found |= {name: opened.get_slice(name).get_dtype() == "BF16" for name in opened.keys()}  # noqa: SIM118 - safetensors has no iteration
    return found


def test_sft_with_frozen_layers_on_a_base_in_bfloat16_takes_their_files_over(place):
    parent = resolved(place, "sft/half")[1]
    child = trained(place, "sft", "sft/half", "frozen", tune=FREEZE)
    assert taken_over(child, parent) > 0.5  # of a base so small the tokenizer's files are a good part
    kinds = in_bf16(child)
    assert kinds == {name: "layers.3." not in name and name != "model.norm.weight" for name in kinds}
    trained(place, "sft", "sft/single", "whole", tune=FREEZE)
    ours, plain = loaded(place, "sft/frozen"), loaded(place, "sft/whole")
    assert ours.keys() == plain.keys()
    assert all(torch.equal(ours[name], plain[name]) for name in plain)


def test_a_merged_adapter_is_stored_but_for_what_it_changed_and_dpo_starts_from_it_as_from_the_adapter(place):
    parent = resolved(place, "sft/half")[1]
    registry, _ = resolved(place, trained(place, "sft", "sft/half", "lora", lora={"rank": 2, "target_modules": ["q_proj", "v_proj"]}).ref)
    export(registry, "sft/lora", place / "exported", Options(merge=True))
    merged = import_model(registry, str(place / "exported"), "sft/merged", template="plain")
    kinds = in_bf16(merged)
    assert kinds == {name: "q_proj" not in name and "v_proj" not in name for name in kinds}
    assert taken_over(merged, parent) > 0.5
    for name in ("merged", "lora"):
        trained(place, "dpo", f"sft/{name}", name)
    one, other = loaded(place, "dpo/merged"), loaded(place, "dpo/lora")
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not torch.equal(one["model.norm.weight"], loaded(place, "sft/merged")["model.norm.weight"]), "it was trained"
