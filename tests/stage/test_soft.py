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
from tests.stage.runs import run, settings, weights, workspace

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




class Interrupted(Exception):
    """Stands for a crash."""


ENCODERS = {"p_tuning": {"encoder": "lstm", "encoder_hidden_size": 8, "encoder_dropout": 0.2}, "prefix_tuning": {"prefix_projection": True, "encoder_hidden_size": 8}}


@pytest.mark.parametrize("method", ENCODERS)
def test_a_run_that_crashed_ends_as_if_it_had_not(place, monkeypatch, method):
    """Bit for bit, although what peft saves is not what is trained (the network that makes the vectors)."""
    from stages.training import guarding

    def values(name):
        tune = {"method": method, "virtual_tokens": 3} | ENCODERS[method]
        return settings(place, "sft", FAST | {"max_steps": 6, "save_every": 2}, name=f"{name}-{method[:2]}", output=str(place / f"{name}-{method}"), tune=tune)

    whole, check = run("sft", values("whole")), guarding.SkipSteps.on_pre_optimizer_step

    def crash(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise Interrupted
        return check(self, args, state, control, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(guarding.SkipSteps, "on_pre_optimizer_step", crash)
        with pytest.raises(Interrupted):
            run("sft", values("broken"))
    broken = run("sft", values("broken"))
    one, other = weights(whole), weights(broken)
    assert one.keys() == other.keys() == {"prompt_embeddings"}
    assert torch.equal(one["prompt_embeddings"], other["prompt_embeddings"])
    losses = [[json.loads(line).get("sft/loss") for line in (place / f"{name}-{method}" / "metrics.jsonl").read_text().splitlines()] for name in ("whole", "broken")]
    assert losses[0] == losses[1]


def test_early_stopping_publishes_the_best_prompt(place, monkeypatch):
    """Evaluations that say the second step was best: what is published is what a run of two steps ends with."""
    from stages.training import evaluation

    def trained(name: str, **train):
        train = FAST | {"eval_every": 1, "schedule": "constant"} | train
        found = run("sft", settings(place, "sft", train, name=name, output=str(place / name), tune={"method": "p_tuning", "virtual_tokens": 3}))
        return weights(found)["prompt_embeddings"]

    two, said = trained("two-steps", max_steps=2), iter([3.0, 1.0, 2.0, 4.0])
    monkeypatch.setattr(evaluation, "evaluate_exactly", lambda *_: {"loss": next(said)})
    assert torch.equal(trained("stopped", max_steps=8, early_stopping_patience=2), two)


def test_a_grandchild_has_its_adapter_on_its_parents_own_weights(place, parents):
    """prompt tuning -> DPO in full -> SFT with LoRA -> PPO with LoRA, whose reward model shares prompt and weights; each under the one prompt."""
    parent = parents("prompt_tuning")
    dpo = run("dpo", settings(place, "dpo", FAST | {"learning_rate": 1e-3}, name="line", output=str(place / "line-d"), init_from=parent.ref))
    sft = run("sft", settings(place, "sft", FAST | {"learning_rate": 1e-3}, name="line", output=str(place / "line-s"), init_from=dpo.ref, **LORA))
    assert sft.info("stage_info")["adapter"] | {"base_digest": None} == {"base": dpo.ref, "base_id": dpo.id, "base_digest": None, "inside": "base", "vocabulary": 259}
    assert dpo.id in {ancestor.id for ancestor in origin_of(place, sft).ancestors()}, "gc might take the weights under its adapter"
    for child, lora in ((dpo, False), (sft, True)):
        assert (child.model_dir / "base" / "adapter_config.json").exists() == lora
    torch.testing.assert_close(logits(place, sft), plain(sft, dpo.model_dir / "base"), atol=1e-4, rtol=1e-4)
    reward = run("reward", settings(place, "reward", FAST, name="line", output=str(place / "line-r"), init_from=dpo.ref, **LORA))
    values = ppo_runs.settings(place, "line-p", {"iterations": 1}, init_from=dpo.ref, scorers=[{"kind": "model", "checkpoint": reward.ref}], evaluation=None, **LORA)
    values["split"] = {"validation": 0.1, "test": 0.1}
    _, _, _, built, _ = ppo_runs.assembled(values)
    [part] = built.scorer.parts.values()
    assert part.scorer.model is built.trained.policy, "the reward model has a backbone of its own"
    apart = models.load_scorer(origin_of(place, reward))
    with torch.no_grad():
        torch.testing.assert_close(part.scorer.score_ids([IDS[0, :8].tolist()], [IDS[0, 8:].tolist()])[0], apart(input_ids=IDS).logits[0, 0], atol=1e-5, rtol=1e-5)
    child = ppo_runs.run(values)
    assert child.info("stage_info")["adapter"]["base_id"] == dpo.id
    torch.testing.assert_close(logits(place, child), plain(child, dpo.model_dir / "base"), atol=1e-4, rtol=1e-4)


def test_what_does_not_go_with_a_prompt_is_refused_before_training(place, parents):
    parent = parents("prefix_tuning")
    refusals = {
        "two can't be stacked": ("sft", {"tune": "prompt_tuning"}),
        "set packing: false": ("sft", {"packing": True}),
        "gradient_checkpointing recomputes": ("dpo", {"train": FAST | {"gradient_checkpointing": True}}),
    }
    for words, (stage, changes) in refusals.items():
        with pytest.raises(UserError, match=words):
            run(stage, settings(place, stage, FAST, name="never", output=str(place / "never"), init_from=parent.ref) | changes)
    values = ppo_runs.settings(place, "never-p", init_from=parent.ref, engine={"kind": "continuous"}, split={"validation": 0.1, "test": 0.1})
    with pytest.raises(UserError, match=r"engine.kind continuous samples without the prompt"):
        ppo_runs.run(values)


def test_the_generate_engine_samples_with_the_prompt(place, parents):
    """It proves itself against a training forward before the first rollout."""
    values = ppo_runs.settings(place, "generated", {"iterations": 1}, init_from=parents("prompt_tuning").ref, engine={"kind": "generate"}, split={"validation": 0.1, "test": 0.1})
    ppo_runs.run(values | {"evaluation": None})
    assert ppo_runs.metrics(values)[0]["objective/kl"] == pytest.approx(0, abs=1e-5)


def test_align_eval_reads_and_writes_with_the_prompt(place, parents):
    """Its KL to the base is not 0, and its log-probs are those of peft."""
    from configs.schema import EvalConfig
    from stages.evaluation.evaluate import evaluate
    from stages.evaluation.likelihood import completion_logprobs

    cfg = EvalConfig.model_validate({
        "checkpoints": {"soft": parents("p_tuning").ref, "base": str(place / "base")}, "prompts": str(place / "prompts.jsonl"), "registry": str(place / "registry"),
        "scorers": [{"kind": "length", "target": 3}], "reference": "base", "subset": "all", "sampling": {"max_new_tokens": 6}, "split": {"validation": 0.1, "test": 0.1},
    })
    found = evaluate(cfg, say=lambda line: None)["models"]
    assert found["base"]["kl"]["k1"] == 0 < found["soft"]["kl"]["k1"]
    scored, _ = completion_logprobs(models.load_policy(origin_of(place, parents("p_tuning"))), [IDS[0, :8].tolist()], [IDS[0, 8:].tolist()], temperature=1.0, pad_id=256)
    expected = plain(parents("p_tuning"), place / "base")[0, 7:-1].log_softmax(-1).gather(1, IDS[0, 8:, None]).squeeze(1)
    torch.testing.assert_close(torch.tensor(scored[0]).float(), expected, atol=1e-4, rtol=1e-4)


def check_lines(place, checkpoint, exported: Path) -> None:
    """The lines of the card, and those that `align registry show` prints, load it as they are written."""
    import contextlib
    import io

    from launch.cli import main

    card = (exported / "README.md").read_text().split("```python\n")[1].split("```")[0]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(["registry", "show", "--registry", str(place / "registry"), checkpoint.ref]) == 0
    shown = "from peft" + printed.getvalue().split("\nfrom peft")[1]
    for text in (card.replace("FOLDER", str(exported)).replace('"BASE"', f'"{place / "base"}"'), shown):
        names: dict = {}
        exec(text, names)
        with torch.no_grad():
            found = names["model"].eval()(input_ids=IDS).logits[:, -IDS.shape[1] :]
        torch.testing.assert_close(found, logits(place, checkpoint), atol=1e-4, rtol=1e-4)
    assert ("base = AutoModelForCausalLM.from_pretrained" in card, "model = PeftModel.from_pretrained(base, " in card) == (True, True)


@pytest.mark.parametrize("lora", [None, False, True])
def test_exported_and_imported_it_is_the_same_model(place, parents, tmp_path, lora):
    """A prompt on the base, one over whole weights, one over an adapter: with its card, its sums, and without a path of this machine."""
    from transformers import AutoModelForCausalLM

    from stages.registry.exporting import Options, export
    from stages.registry.importing import import_model

    registry, checkpoint = Registry(place / "registry"), parents("p_tuning")
    if lora is not None:
        name = f"exported-{lora}".lower()
        checkpoint = run("dpo", settings(place, "dpo", FAST | {"learning_rate": 1e-3}, name=name, output=str(place / name), init_from=checkpoint.ref, **(LORA if lora else {})))
    with pytest.raises(UserError, match="can't be merged into weights"):
        export(registry, checkpoint.ref, tmp_path / "merged", Options(merge=True))
    exported = export(registry, checkpoint.ref, tmp_path / "out").folder
    assert str(place) not in "".join(file.read_text() for file in exported.rglob("*.json")) + (exported / "README.md").read_text()
    assert ("/base" in (exported / "README.md").read_text()) == (lora is not None)
    with pytest.raises((OSError, ValueError)):  # never a model without its prompt
        AutoModelForCausalLM.from_pretrained(exported)
    if lora is not None:
        check_lines(place, checkpoint, exported)
    again = import_model(Registry(tmp_path / "other"), str(exported), "sft/again", base=None if lora is False else str(place / "base"))
    found = models.load_policy(models.find("sft/again", tmp_path / "other"))
    with torch.no_grad():
        assert torch.equal(found(input_ids=IDS, use_cache=False).logits, logits(place, checkpoint))
    assert not Registry(tmp_path / "other").verify(again.ref, deep=True)
    if lora is False:
        with pytest.raises(UserError, match="brings the weights under its soft prompt"):
            import_model(Registry(tmp_path / "other"), str(exported), "sft/again", base=str(place / "base"))
