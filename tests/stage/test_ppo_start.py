"""How the models of a PPO run are put together: precision, adapters, where values start, and what is refused at the start."""

from __future__ import annotations

import json

import pytest
import torch

from configs.errors import UserError
from stages import models
from stages.ppo.build import AdapterScorer
from stages.ppo.prompts import row_limit
from stages.ppo.train import main
from stages.registry import Registry
from stages.scorers import reward_scorer
from stages.tokens import load_tokens
from stages.training import entry
from tests.stage.ppo_runs import (
    ADAPTER,
    LORA,
    WHOLE,
    assembled,
    metrics,
    publish_policy,
    publish_reward,
    rollout_of,
    run,
    settings,
    workspace,
)
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = workspace(tmp_path_factory.mktemp("ppo"))
    publish_reward(folder, "whole")
    publish_reward(folder, "adapter", lora=True, seed=6)
    return folder


def started_in_bf16(place, **changes):
    """A rollout in bf16 and what it came from."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)  # the arithmetic is fixed once per process
    try:
        cfg, accelerator, tokens, built, prompts = assembled(settings(place, "bf16", {"precision": "bf16", "rollout_batch_size": 32}, **changes))
        return built, rollout_of(cfg, accelerator, tokens, built, prompts)
    finally:
        AcceleratorState._reset_state(True)


@pytest.mark.parametrize("changes", [{"scorers": [WHOLE]}, {"lora": LORA, "scorers": [ADAPTER]}, {"scorers": [ADAPTER]}])
def test_bf16_rounds_neither_values_nor_scores(place, changes):
    """Both heads in float32: a bf16 number is a multiple of 1/32 between 4 and 8."""
    built, rollout = started_in_bf16(place, **changes)
    for numbers in (rollout.values[:, :-1][rollout.tokens.mask], rollout.scores):
        assert (numbers.bfloat16().float() != numbers).float().mean() > 0.5
    exact = reward_scorer(next(iter(changes["scorers"]))["checkpoint"], place / "registry")
    scorer = next(iter(built.scorer.parts.values())).scorer
    rows = [[5, 6, 7], [8]], [[9, 10], [11, 12, 13]]
    gap = (scorer.score_ids(*rows) - exact.score_ids(*rows)).abs().max()
    assert gap < 0.1
    assert (gap > 1e-6) == (scorer.autocast is not None), "bf16 where it is said to be, and float32 under a merged adapter"


def test_bf16_stores_the_shared_backbone_in_bf16_and_its_adapters_and_heads_in_float32(place):
    built, rollout = started_in_bf16(place, lora=LORA, scorers=[ADAPTER])
    policy = {name: p for name, p in built.trained.policy.named_parameters()}
    assert {p.dtype for n, p in policy.items() if "_proj" in n and "lora" not in n} == {torch.bfloat16}
    assert {p.dtype for n, p in policy.items() if "_proj" not in n or "lora" in n} == {torch.float32}
    scorer = next(iter(built.scorer.parts.values())).scorer
    assert scorer.head.weight.dtype == built.trained.value_head.weight.dtype == torch.float32
    assert torch.equal(rollout.old_logprobs, rollout.ref_logprobs)


def test_a_reward_adapter_that_was_trained_with_dropout_scores_and_starts_values_without(place):
    publish_reward(place, "dropped", lora=True, seed=6, dropout=0.5)
    *_, built, _ = assembled(settings(place, lora=LORA, scorers=[{"kind": "model", "checkpoint": "reward/dropped"}]))
    inside, alone = next(iter(built.scorer.parts.values())).scorer, reward_scorer("reward/dropped", place / "registry")
    assert isinstance(inside, AdapterScorer)
    built.trained.train()
    rows = [[5, 6, 7], [8]], [[9, 10], [11, 12, 13]]
    torch.testing.assert_close(inside.score_ids(*rows), alone.score_ids(*rows), atol=1e-5, rtol=0)


@pytest.mark.parametrize("checkpoint", ["whole", "adapter"])
@pytest.mark.parametrize("changes", [{"scale_scores": True}, {"scale_scores": False}, {"scale_scores": True, "center_scores": False}])
def test_row_17_values_start_as_the_scores_are_shaped(place, checkpoint, changes):
    """Weight -3, mean 0.3, std 2, and a head with a bias: the value after the last token is the shaped score."""
    from rewards.shaping import shape_scores
    from tests.unit.ppo_samples import tokens_of

    name = f"{checkpoint}-biased"
    if not Registry(place / "registry").list("reward", name):
        publish_reward(place, name, lora=checkpoint == "adapter", bias=0.7)
    scorers = [{"kind": "model", "checkpoint": f"reward/{name}", "weight": -3.0}]
    cfg, *_, built, _ = assembled(settings(place, scorers=scorers, **({"lora": LORA} if checkpoint == "adapter" else {}), **changes))
    prompts, completions = [[5, 6, 7], [8]], [[9, 10], [11, 12, 13]]
    scores = torch.tensor(built.scorer.score(["", ""], ["", ""], token_key=next(iter(built.scorer.parts.values())).scorer.token_key, prompt_ids=prompts, completion_ids=completions).total)
    shaped = shape_scores(
        scores, torch.ones(2, dtype=torch.bool), mean=built.scorer.mean if cfg.center_scores else 0.0, std=built.scorer.std if cfg.scale_scores else 1.0,
        clip=None, missing_eos="none", missing_eos_penalty=0.0,
    )  # fmt: skip
    with torch.no_grad():
        values = built.trained(tokens_of(prompts, completions, pad=256)).values
    torch.testing.assert_close(torch.stack([values[0, 2], values[1, 3]]), shaped, atol=1e-5, rtol=0)


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_an_adapter_on_a_weight_that_two_layers_share_is_refused(place, target):
    """Merged, it would change the other layer too: what is published would not be what was trained."""
    with pytest.raises(UserError, match="which share one weight"):
        assembled(settings(place, lora=LORA | {"target_modules": ["q_proj", target]}))


def test_an_adapter_from_outside_on_a_shared_weight_is_refused_when_it_would_be_merged(place, tmp_path):
    from peft import LoraConfig, get_peft_model

    base = models.load_policy(models.find("sft/one", place / "registry"))
    peft_model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"], task_type="CAUSAL_LM"))
    peft_model.peft_config["default"].base_model_name_or_path = str(place / "base")
    peft_model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match="which share one weight"):
        models.load_policy(models.find(str(tmp_path / "adapter"), place / "registry"))


def test_an_adapter_on_the_output_head_is_refused_in_ppo(place, tmp_path):
    tiny_model(tmp_path / "untied", tie_word_embeddings=False)
    values = settings(place, init_from=str(tmp_path / "untied"), template="raw")
    assembled(values | {"lora": LORA | {"target_modules": ["q_proj", "embed_tokens"]}})
    with pytest.raises(UserError, match="names the output head"):
        assembled(values | {"lora": LORA | {"target_modules": ["q_proj", "lm_head"]}})


@pytest.mark.parametrize("changes", [{"scorers": [WHOLE]}, {"scorers": [ADAPTER], "lora": LORA}, {"scorers": [ADAPTER, WHOLE], "lora": LORA}])
def test_every_model_of_a_run_has_the_attention_kernel_that_was_asked_for(place, changes):
    *_, built, _ = assembled(settings(place, attn_implementation="eager", **changes))
    scorers = [part.scorer.model for part in built.scorer.parts.values()]
    found = {module.config._attn_implementation for m in (built.trained, built.reference.model, *scorers) for module in m.modules() if hasattr(module, "config")}
    assert found == {"eager"}


def test_each_scorers_own_mean_is_logged_over_the_completions_it_applies_to(place):
    names = [f"tests.stage.ppo_runs:{name}" for name in ("share_of_vowels", "sometimes")]
    values = settings(place, "parts", {"iterations": 1, "rollout_batch_size": 16}, scorers=[{"kind": "python", "function": name, "weight": 2.0} for name in names])
    cfg, accelerator, tokens, built, prompts = assembled(values)
    rollout = rollout_of(cfg, accelerator, tokens, built, prompts)
    assert 0 < rollout.parts_mask[:, 1].sum() < 16
    torch.testing.assert_close(2 * (rollout.parts * rollout.parts_mask).sum(1), rollout.scores)
    run(values)
    logged = metrics(values)[0]
    assert logged[f"objective/score/{names[0]}"] == pytest.approx(rollout.parts[:, 0].mean().item())
    assert logged[f"objective/score/{names[1]}"] == pytest.approx(rollout.parts[rollout.parts_mask[:, 1], 1].mean().item())


@pytest.mark.parametrize("role", [{"scorers": [{"kind": "model", "checkpoint": "reward/short"}]}, {"value_init": "reward/short"}])
def test_a_row_has_no_more_tokens_than_every_model_that_reads_it(place, role):
    if not Registry(place / "registry").list("reward", "short"):
        publish_reward(place, "short", positions=21)
    cfg, _, tokens, built, _ = assembled(settings(place, **role))
    assert row_limit(cfg, built, tokens) == 21
    assert row_limit(cfg.model_copy(update={"max_length": 20}), built, tokens) == 20
    run(settings(place, "fits", {"iterations": 1}, **role))


def test_a_reward_model_with_another_template_and_too_few_positions_is_refused_at_the_start(place):
    tokens = load_tokens(models.Origin(str(place / "base"), None, None), "chatml")
    publish_reward(place, "narrow", tokens=tokens, positions=60)
    values = settings(place, "narrow", {"iterations": 1}, scorers=[{"kind": "model", "checkpoint": "reward/narrow"}])
    with pytest.raises(UserError, match=r"scorer reward/narrow reads 60 tokens; the longest prompt has \d+ of its tokens"):
        run(values)


def test_a_name_is_looked_up_once_and_means_that_version_from_then_on(place, monkeypatch):
    """Whatever is published while the run starts: every model comes from the version that its name meant at first."""
    asked, resolve = [], Registry.resolve

    def looked_up(registry, ref, *rest, **options):
        found = resolve(registry, ref, *rest, **options)
        if "@" not in str(ref) and "/" in str(ref):
            asked.append(ref)
            publish_policy(place, ref.partition("/")[2]) if ref == "sft/moving" else None
        return found

    first = publish_policy(place, "moving")
    monkeypatch.setattr(Registry, "resolve", looked_up)
    file = place / "moving.json"
    file.write_text(json.dumps(settings(place, "moved", {"iterations": 1}, init_from="sft/moving", reference="sft/moving", scorers=[WHOLE])))
    entry.run(main, "ppo", ["--config", str(file)])
    assert sorted(asked) == ["reward/whole", "sft/moving"]
    monkeypatch.undo()
    made = Registry(place / "registry").resolve("ppo/moved")
    assert {p["id"] for p in made.manifest["parents"] if p["role"] in ("init_from", "reference")} == {first.id}
    assert Registry(place / "registry").resolve("sft/moving").id != first.id
    assert made.info("config")["init_from"] == first.ref == "sft/moving@1"


def test_an_adapter_on_the_hub_is_told_from_a_whole_model(place, tmp_path, monkeypatch):
    """A cache of the hub as a download leaves it, holding base and adapter in one repository."""
    import shutil

    from huggingface_hub import constants

    snapshot = tmp_path / "models--someone--tuned" / "snapshots" / "abc"
    shutil.copytree(place / "base", snapshot)
    (tmp_path / "models--someone--tuned" / "refs").mkdir()
    (tmp_path / "models--someone--tuned" / "refs" / "main").write_text("abc")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    models._refuse_hub_adapter.cache_clear()
    origin = models.find("someone/tuned", place / "registry")
    models.load_policy(origin)
    (snapshot / "adapter_config.json").write_text("{}")
    models._refuse_hub_adapter.cache_clear()
    for load in (models.load_policy, models.load_tokenizer):
        with pytest.raises(UserError, match="someone/tuned is an adapter on the hub"):
            load(origin)


def test_bad_input_an_output_that_cannot_be_written(place, tmp_path):
    """Said before a model is loaded; by every stage, whose `ready.check` it is."""
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=r"output: .*file.* can't be written \((Not a directory|File exists)\); make room, check its owner, or name another folder"):
            run(settings(place, "unwritable") | {"output": str(output)})
