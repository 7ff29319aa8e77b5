"""Adapters of one base on one copy of it: the same answers as merged ones, and the base loaded once."""

from __future__ import annotations

import pytest
import torch

from configs.errors import UserError
from stages import models
from stages.adapters.shelf import Shelf
from stages.evaluation.evaluate import evaluate
from stages.registry import Registry
from tests.adapters import logits, publish_adapter, publish_whole, world
from tests.unit.test_evaluation import config


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """a and b on the checkpoint sft/base, c on the folder that it was made from."""
    registry, folder = world(tmp_path_factory.mktemp("shelf"))
    publish_whole(registry, "sft/base", folder)
    publish_adapter(registry, "sft/a", "sft/base", seed=1)
    publish_adapter(registry, "sft/b", "sft/base", seed=2, r=3, target_modules=["o_proj", "down_proj"])
    publish_adapter(registry, "sft/c", folder, seed=3)
    publish_adapter(registry, "sft/on-a", "sft/a", seed=4)
    return registry, folder


@pytest.fixture
def loads(monkeypatch):
    """Folders whose weights were loaded."""
    seen, load = [], models.from_pretrained

    def remember(cls, folder, **arguments):
        if cls.__name__.startswith("AutoModel"):
            seen.append(folder)
        return load(cls, folder, **arguments)

    monkeypatch.setattr(models, "from_pretrained", remember)
    return seen


def shelf(registry, *names, dtype=torch.float32):
    origins = {name: models.find(name, registry.root) for name in names}
    return Shelf(origins, dict.fromkeys(names, 259), device=torch.device("cpu"), dtype=dtype)


def test_a_switched_adapter_says_what_the_merged_one_says(place, loads):
    registry, _ = place
    names = ["sft/a", "sft/b", "sft/base"]
    found = shelf(registry, *names)
    gives = {name: found.weights(name) for name in names}
    assert len(loads) == 1, "the base is held once"
    for name in [*names, *reversed(names)]:
        assert torch.allclose(logits(gives[name]()), logits(models.load_policy(models.find(name, registry.root))), atol=1e-4), name
    assert not torch.allclose(logits(gives["sft/a"]()), logits(gives["sft/b"]()), atol=1e-2)
    assert not any(parameter.requires_grad for parameter in gives["sft/a"]().parameters())
    assert not any(module.training for module in gives["sft/b"]().modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_switched_soft_prompt_says_what_it_says_alone(place, loads, tmp_path, dtype):
    """Three kinds, the base itself, and (in float32) a LoRA adapter, in turns on one copy."""
    from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig

    registry, folder = Registry(tmp_path / "registry"), place[1]
    publish_whole(registry, "sft/base", folder)
    publish_adapter(registry, "sft/a", "sft/base", seed=1)
    shared = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
    kinds = {"prompt": PromptTuningConfig(**shared), "prefix": PrefixTuningConfig(**shared), "p": PromptEncoderConfig(**shared, encoder_hidden_size=8)}
    for seed, (name, kind) in enumerate(kinds.items()):
        publish_adapter(registry, f"sft/{name}", "sft/base", seed=seed, config=kind)
    names = [*(f"sft/{name}" for name in kinds), "sft/base", *(["sft/a"] if dtype == torch.float32 else [])]
    loads.clear()
    found = shelf(registry, *names, dtype=dtype)
    gives = {name: found.weights(name) for name in names}
    assert len(loads) == 1, "the base is held once"
    alone = {name: logits(models.load_policy(models.find(name, registry.root), dtype=dtype)) for name in names}
    for name in [*names, *reversed(names)]:
        assert torch.equal(logits(gives[name]()), alone[name]) or (name == "sft/a" and torch.allclose(logits(gives[name]()), alone[name], atol=1e-4)), name
    assert not torch.allclose(alone["sft/prompt"], alone["sft/base"], atol=1e-2)
    assert not torch.allclose(alone["sft/prefix"], alone["sft/base"], atol=1e-2)


def test_only_what_lies_on_one_base_is_put_on_one_copy(place):
    registry, folder = place
    found = shelf(registry, "sft/c", "sft/a", "sft/on-a", "sft/base", "sft/b", folder)
    assert found.neighbours("sft/a") == ["sft/a", "sft/base", "sft/b"]
    assert found.neighbours("sft/c") == ["sft/c", folder]
    assert found.neighbours("sft/on-a") == ["sft/on-a"]
    assert found.in_order("sft/b") == ["sft/b", "sft/a", "sft/base", "sft/c", folder, "sft/on-a"]
    assert shelf(registry, "sft/a", "sft/base", dtype=torch.bfloat16).neighbours("sft/a") == ["sft/a"], "adapters lie on float32; the base itself was asked for in bf16"


def test_an_adapter_that_brings_its_own_embeddings_shares_only_with_its_like(tmp_path):
    """Embeddings that have grown stand in the adapter's file: the same growth is the same copy, other values are another."""
    registry, folder = world(tmp_path)

    def grown(family: str, seed: int, value: float) -> None:
        model = models.load_policy
        models.load_policy = lambda *args, **kwargs: larger(model(*args, **kwargs), value)
        try:
            publish_adapter(registry, family, folder, seed=seed)
        finally:
            models.load_policy = model

    def larger(model, value):
        models.resize_to(model, 264)
        with torch.no_grad():
            model.get_input_embeddings().weight[-1] = value
        return model

    for seed, (name, value) in enumerate({"x": 1.0, "y": 1.0, "z": 2.0}.items()):
        grown(f"sft/{name}", seed, value)
    origins = {name: models.find(name, registry.root) for name in ("sft/x", "sft/y", "sft/z")}
    found = Shelf(origins, dict.fromkeys(origins, 264), device=torch.device("cpu"))
    assert found.neighbours("sft/x") == ["sft/x", "sft/y"]
    for name in ("sft/x", "sft/y", "sft/z"):
        assert torch.allclose(logits(found.weights(name)(), (5, 263, 7)), logits(models.load_policy(origins[name]), (5, 263, 7)), atol=1e-4)


def test_an_evaluation_switches_adapters_and_finds_what_merged_ones_show(place, tmp_path, loads, monkeypatch):
    registry, _ = place
    labels = {"base": "sft/base", "a": "sft/a", "b": "sft/b"}
    asked = config(tmp_path, labels, registry=str(registry.root), reference="a")
    told = []
    switched = evaluate(asked, say=told.append)
    assert loads.count(str(registry.resolve("sft/base").model_dir)) == len(loads) == 1
    assert all("an adapter switched on a base that is shared" in line for line in told)
    monkeypatch.setattr("stages.adapters.shelf.place_of", lambda origin, rows: None)
    apart = evaluate(asked)
    assert len(loads) == 1 + 3
    assert switched["eval_set"] == apart["eval_set"]
    for label in labels:
        one, two = switched["models"][label], apart["models"][label]
        assert one["score"]["mean"] == pytest.approx(two["score"]["mean"], abs=1e-6)
        assert one["length"] == two["length"]
        assert one["kl"]["k3"] == pytest.approx(two["kl"]["k3"], rel=1e-3, abs=1e-5)
    assert switched["models"]["a"]["kl"]["k3"] == 0
    assert switched["models"]["b"]["kl"]["k3"] > 0.1


def test_what_was_measured_is_let_go_of(place, tmp_path, monkeypatch):
    """Beside the reference's no copy stays once the last of its adapters is measured."""
    registry, folder = place
    forgotten, forget = [], Shelf.forget
    monkeypatch.setattr(Shelf, "forget", lambda self, label: (forgotten.append(label), forget(self, label)))
    labels = {"c": "sft/c", "a": "sft/a", "folder": folder, "b": "sft/b", "on-a": "sft/on-a"}
    evaluate(config(tmp_path, labels, registry=str(registry.root), max_prompts=1, samples_per_prompt=1))
    assert forgotten == ["b", "on-a"]


def test_a_base_that_changed_is_found_before_anything_is_measured(tmp_path):
    registry, folder = world(tmp_path)
    publish_adapter(registry, "sft/a", folder)
    world(tmp_path, seed=8)
    with pytest.raises(UserError, match="is an adapter trained on"):
        evaluate(config(tmp_path, {"a": "sft/a", "base": folder}, registry=str(registry.root)))
