"""Soft prompts from SFT to PPO: trained, resumed, published, and the parent of every other stage, in full and with LoRA."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from configs.errors import UserError
from stages import models, soft
from stages.registry import Registry
from tests.stage import ppo_runs
from tests.stage.runs import run, settings, workspace

METHODS = ("prompt_tuning", "prefix_tuning", "p_tuning")
FAST = {"max_steps": 4, "eval_every": 2, "learning_rate": 0.05}
LORA = {"lora": {"rank": 4, "alpha": 8}}
IDS = torch.arange(60, 80)[None]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = workspace(tmp_path_factory.mktemp("soft"), initializer_range=0.2)
    rows = [json.loads(line)["prompt"] for line in (folder / "sft.jsonl").read_text().splitlines()]
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in rows[:20]))
    return folder


@pytest.fixture(scope="module")
def parents(place):
    """Each method's checkpoint, trained once."""
    found = {}

    def of(method: str):
        if method not in found:
            tune = {"method": method, "virtual_tokens": 4}
            found[method] = run("sft", settings(place, "sft", FAST, name=method.replace("_", "-"), output=str(place / method), tune=tune))
        return found[method]

    return of


def origin_of(place, checkpoint):
    return models.find(checkpoint.ref, place / "registry")


@torch.no_grad()
def logits(place, checkpoint, load=models.load_policy):
    return load(origin_of(place, checkpoint))(input_ids=IDS, use_cache=False).logits


@torch.no_grad()
def plain(checkpoint, base: Path, kind: str = "AutoModelForCausalLM"):
    """The logits of a published folder with nothing but peft and transformers."""
    import transformers
    from peft import PeftModel

    auto, folder = getattr(transformers, kind), checkpoint.model_dir
    extra = {"num_labels": 1} if "Sequence" in kind else {}
    if (folder / "base/config.json").exists():
        model = auto.from_pretrained(folder / "base", **extra)
    else:
        model = auto.from_pretrained(base, **extra)
        if (folder / "base").exists():
            model = PeftModel.from_pretrained(model, folder / "base").merge_and_unload()
    model.config.pad_token_id = 256
    found = PeftModel.from_pretrained(model, folder).eval()(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    return found if "Sequence" in kind else found[:, -IDS.shape[1] :]


@pytest.mark.parametrize("method", METHODS)
def test_trained_prompts_learn_and_load_in_plain_peft(place, parents, method):
    checkpoint = parents(method)
    lines = [json.loads(line) for line in (place / method / "metrics.jsonl").read_text().splitlines()]
    losses = [line["sft/loss"] for line in lines if "sft/loss" in line]
    assert losses[-1] < losses[0]
    torch.testing.assert_close(logits(place, checkpoint), plain(checkpoint, place / "base"), atol=1e-4, rtol=1e-4)
    assert checkpoint.info("stage_info")["soft_prompt"]["virtual_tokens"] == 4
    assert {Path(name).name for name in checkpoint.manifest["files"] if name.endswith(".safetensors")} == {"adapter_model.safetensors"}
    assert checkpoint.size < 100_000


def test_published_metrics_are_those_of_peft_on_the_published_folder(place, parents):
    """The loss is read at completion positions although peft's logits begin with those of the virtual tokens."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from tests.stage.test_sft import by_hand, encoded

    checkpoint = parents("p_tuning")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(place / "base"), checkpoint.model_dir).eval()

    class Cut:
        def __call__(self, ids):
            out = model(input_ids=ids)
            out.logits = out.logits[:, -ids.shape[1] :]
            return out

    loss, accuracy = by_hand(Cut(), encoded(place, "validation"))
    assert checkpoint.info("metrics")["loss"] == pytest.approx(loss, rel=1e-5)
    assert checkpoint.info("metrics")["token_accuracy"] == pytest.approx(accuracy, abs=1e-9)


def check_child(place, parent, child, *, lora: bool, load=models.load_policy, kind="AutoModelForCausalLM"):
    """It has its parent's prompt, its own weights under it, loads alike everywhere, and is not its parent."""
    mine = logits(place, child, load)
    torch.testing.assert_close(mine, plain(child, place / "base", kind).reshape(mine.shape), atol=1e-4, rtol=1e-4)
    assert soft.same_prompt(origin_of(place, parent), origin_of(place, child))
    assert (child.model_dir / "base" / ("adapter_config.json" if lora else "config.json")).is_file()
    assert child.info("stage_info")["soft_prompt"] == parent.info("stage_info")["soft_prompt"]
    without = load(soft.beneath(origin_of(place, child)))
    with torch.no_grad():
        assert (without(input_ids=IDS, use_cache=False).logits - mine).abs().max() > 1e-3, "the prompt says nothing"
    assert not Registry(place / "registry").verify(child.ref, deep=True)
    models.verify(origin_of(place, child))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("lora", [False, True])
def test_reward_models_descend_from_every_method(place, parents, method, lora):
    parent = parents(method)
    name = f"{method}-{'lora' if lora else 'full'}".replace("_", "-")
    values = settings(place, "reward", FAST, name=name, output=str(place / f"r-{name}"), init_from=parent.ref, **(LORA if lora else {}))
    child = run("reward", values)
    check_child(place, parent, child, lora=lora, load=models.load_scorer, kind="AutoModelForSequenceClassification")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("lora", [False, True])
def test_dpo_descends_from_every_method(place, parents, method, lora):
    """The reference sees the prompt too: the first loss is ln 2."""
    parent = parents(method)
    name = f"{method}-{'lora' if lora else 'full'}".replace("_", "-")
    output = place / f"d-{name}"
    child = run("dpo", settings(place, "dpo", FAST | {"learning_rate": 1e-3}, name=name, output=str(output), init_from=parent.ref, **(LORA if lora else {})))
    first = json.loads((output / "metrics.jsonl").read_text().splitlines()[0])["dpo/loss"]
    assert first == pytest.approx(math.log(2), abs=1e-5)
    check_child(place, parent, child, lora=lora)
    assert (logits(place, child) - logits(place, parent)).abs().max() > 1e-4


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("lora", [False, True])
def test_ppo_descends_from_every_method_and_is_exact(place, parents, method, lora):
    """At the first update the policy is what was sampled from and what KL is measured to, and the reward model of the same prompt scores."""
    parent = parents(method)
    name = f"{method}-{'lora' if lora else 'full'}".replace("_", "-")
    try:
        models.find(f"reward/{name}", place / "registry")
    except UserError:
        run("reward", settings(place, "reward", FAST, name=name, output=str(place / f"r-{name}"), init_from=parent.ref, **(LORA if lora else {})))
    values = ppo_runs.settings(place, f"p-{name}", {"iterations": 2}, init_from=parent.ref, scorers=[{"kind": "model", "checkpoint": f"reward/{name}"}], **(LORA if lora else {}))
    values |= {"split": {"validation": 0.1, "test": 0.1}, "evaluation": None}
    child = ppo_runs.run(values)
    first = next(line for line in ppo_runs.metrics(values) if "objective/kl" in line)
    assert first["objective/kl"] == pytest.approx(0, abs=1e-5)
    check_child(place, parent, child, lora=lora)
    assert (logits(place, child) - logits(place, parent)).abs().max() > 1e-5


