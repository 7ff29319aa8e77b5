"""PPO on a tiny model from end to end: where a run starts, what it trains, what it leaves alone, what it publishes."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from configs.errors import UserError
from configs.schema import PPOStage
from stages import models
from stages.ppo import train as ppo_train
from stages.ppo.build import AdapterScorer
from stages.ppo.collect import experience_of
from stages.ppo.modules import POLICY, REWARD, VALUE, is_of
from stages.ppo.optimizer import optimizer_of
from stages.ppo.train import main
from stages.ppo.update import update_policy
from stages.registry import Registry
from stages.scorers import reward_scorer
from stages.tokens import load_tokens
from tests.stage.ppo_runs import (
    LORA,
    PROMPTS,
    assembled,
    metrics,
    publish_policy,
    publish_reward,
    rollout_of,
    run,
    settings,
    weights,
    workspace,
)

WHOLE, ADAPTER = ({"kind": "model", "checkpoint": f"reward/{name}"} for name in ("whole", "adapter"))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = workspace(tmp_path_factory.mktemp("ppo"))
    publish_policy(folder, "two")  # the same weights, another checkpoint
    publish_reward(folder, "whole")
    publish_reward(folder, "adapter", lora=True, seed=6)
    return folder


def one_update(values):
    """Build, roll out, update once; (models, rollout, parameters before by name)."""
    cfg, accelerator, tokens, built, prompts = assembled(values)
    before = {name: p.detach().clone() for name, p in built.trained.named_parameters()}
    rollout = rollout_of(cfg, accelerator, tokens, built, prompts)
    experience, _ = experience_of(rollout, cfg, kl_coef=cfg.kl_coef, mean=built.scorer.mean, std=built.scorer.std)
    update_policy(built.trained, optimizer_of(cfg, built), accelerator, experience, cfg, 0)
    return built, rollout, before


# -- where a run starts

MODES = {
    "copy": {},
    "head": {"value_function": "head"},
    "reward": {"scorers": [WHOLE]},
    "lora": {"lora": LORA},
    "lora with reward adapter": {"lora": LORA, "scorers": [ADAPTER]},
    "other reference": {"lora": LORA, "reference": "sft/two"},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_trap_11_a_run_starts_with_ratio_one_and_no_kl_to_its_reference(place, mode, temperature):
    values = settings(place, f"start-{mode.split()[-1]}-{temperature}", {"iterations": 2}, sampling={"max_new_tokens": 10, "temperature": temperature}, **MODES[mode])
    checkpoint = run(values)
    first, second = metrics(values)
    assert first["objective/kl"] == pytest.approx(0, abs=1e-5)
    assert first["objective/kl_k3"] == pytest.approx(0, abs=1e-5)
    assert second["objective/kl_k3"] > 1e-4, "the policy moves, or the zeros above prove nothing"
    for line in (first, second):
        assert line["policy/first_ratio"] == pytest.approx(1, abs=1e-5)
        assert line["policy/first_approx_kl"] == pytest.approx(0, abs=1e-5)
        assert line["policy/first_clip_fraction"] == 0
        assert line["rollout/sampler_gap"] < 1e-5
    assert {key: value for key, value in second.items() if key != "iteration"}.items() <= checkpoint.info("metrics").items()
    assert not (Path(values["output"]) / "resume").exists()


@pytest.mark.parametrize("mode", ["reward", "lora", "other reference"])
def test_trap_11_row_8_in_bf16_the_reference_is_still_the_start_policy(place, mode):
    """A reference whose embeddings and norms were stored in bf16 would round what the policy does not: KL from the first step."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)  # the arithmetic is fixed once per process
    try:
        cfg, accelerator, tokens, built, prompts = assembled(settings(place, "bf16", {"precision": "bf16", "rollout_batch_size": 32}, **MODES[mode]))
        rollout = rollout_of(cfg, accelerator, tokens, built, prompts)
    finally:
        AcceleratorState._reset_state(True)
    assert torch.equal(rollout.old_logprobs, rollout.ref_logprobs)
    assert (rollout.sampler_logprobs - rollout.old_logprobs).abs().max() > 1e-4, "bf16 was not used"


def test_trap_3_kl_to_the_reference_grows_when_the_policy_moves_and_the_score_rises(place):
    """Eight iterations with a large step: k1, the mean over samples of the policy, must come out positive."""
    values = settings(place, "moves", {"iterations": 8, "rollout_batch_size": 64, "micro_batch_size": 64, "learning_rate": 2e-2}, lora=LORA, kl_coef=0.0, missing_eos="none")
    run(values)
    lines = metrics(values)
    assert lines[-1]["objective/kl"] > 3 * lines[-1]["objective/kl_se"]
    assert lines[-1]["objective/kl_k3"] > 0.01
    assert lines[-1]["objective/score"] > lines[0]["objective/score"] + 3 * lines[0]["objective/score_se"]


def test_row_7_trap_10_the_sampled_ids_are_what_is_trained_on(place, monkeypatch):
    """Bytes that are no text in UTF-8 would not survive decoding; the rollout's ids are the sampler's all the same."""
    from stages.ppo.engines import native

    seen = []
    original = native.sample
    monkeypatch.setattr(native, "sample", lambda *a, **k: seen.append(original(*a, **k)) or seen[-1])
    cfg, accelerator, tokens, built, prompts = assembled(settings(place, sampling={"max_new_tokens": 10, "stop_at_eos": False}, missing_eos="none"))
    rollout = rollout_of(cfg, accelerator, tokens, built, prompts)
    trained_on = [ids[mask].tolist() for ids, mask in zip(rollout.tokens.completion_ids, rollout.tokens.mask, strict=True)]
    assert trained_on == [s.completion_ids for s in seen[0]]
    again = [tokens.tokenizer(tokens.formatter.decode(ids), add_special_tokens=False).input_ids for ids in trained_on]
    assert again != trained_on, "the tokenizer must be one that drifts, or equality proves nothing"


def test_trap_16_prompts_fewer_than_the_batch(place):
    assert len(PROMPTS) < 8
    cfg, accelerator, tokens, built, prompts = assembled(settings(place))
    rollout = rollout_of(cfg, accelerator, tokens, built, prompts)
    rows = [tuple(ids[mask].tolist()) for ids, mask in zip(rollout.tokens.prompt_ids, rollout.tokens.prompt_mask, strict=True)]
    assert len(rows) == 8
    assert set(rows) == {tuple(tokens.formatter.prompt_ids(text)) for text in PROMPTS}


# -- one backbone


def test_one_backbone_trains_the_adapters_and_leaves_every_base_weight_as_it_was(place, monkeypatch):
    """Through `main`, so that nothing that main does on the way is left out."""
    seen = {}
    original = ppo_train.train

    def spy(cfg, accelerator, built, *rest):
        seen["before"] = {name: p.detach().clone() for name, p in built.trained.named_parameters()}
        result = original(cfg, accelerator, built, *rest)
        seen["after"] = dict(built.trained.named_parameters())
        return result

    monkeypatch.setattr(ppo_train, "train", spy)
    run(settings(place, "bits", lora=LORA, scorers=[ADAPTER]))
    changed = {name for name, p in seen["after"].items() if not torch.equal(p, seen["before"][name])}
    assert not [n for n in changed if not (is_of(n, POLICY) or is_of(n, VALUE) or n.startswith("value_head."))]
    adapters = {name for name in seen["after"] if is_of(name, POLICY) or is_of(name, VALUE)}
    assert adapters
    assert adapters <= changed
    assert [n for n in seen["after"] if is_of(n, REWARD)], "the reward adapter is there, and did not move"


def test_one_backbone_is_one_copy_of_the_weights(place):
    *_, built, _ = assembled(settings(place, lora=LORA, scorers=[ADAPTER]))
    scorer = next(iter(built.scorer.parts.values())).scorer
    assert isinstance(scorer, AdapterScorer)
    parameters = [p for m in (built.trained, built.reference.model, scorer.model, built.published) for p in m.parameters()]
    base = {p.data_ptr(): p.numel() for p in parameters if p.shape == (259, 32)}
    assert len(base) == 1
    one = sum(p.numel() for p in models.load_policy(models.find("sft/one", place / "registry")).parameters())
    frozen = {p.data_ptr(): p.numel() for n, p in built.trained.named_parameters() if not p.requires_grad and not is_of(n, REWARD)}
    assert sum(frozen.values()) == one


def test_one_backbone_the_reference_is_the_start_policy_to_the_bit(place):
    values = settings(place, lora=LORA, scorers=[ADAPTER])
    built, rollout, _ = one_update(values)
    assert torch.equal(rollout.old_logprobs, rollout.ref_logprobs)
    start = models.load_policy(models.find("sft/one", place / "registry"))
    from stages.ppo.modules import Reference

    alone = Reference(start, temperature=1.0).logprobs(rollout.tokens)
    torch.testing.assert_close(built.reference.logprobs(rollout.tokens), alone, atol=1e-6, rtol=0)
    with torch.no_grad():
        moved = built.trained(rollout.tokens).logprobs
    assert (moved - alone)[rollout.tokens.mask].abs().max() > 1e-3, "the policy has moved, its reference has not"


def test_one_backbone_both_adapters_get_gradients_of_their_own_loss(place):
    cfg, accelerator, tokens, built, prompts = assembled(settings(place, lora=LORA, scorers=[ADAPTER]))
    rollout = rollout_of(cfg, accelerator, tokens, built, prompts)
    for adapter, pick in ((POLICY, lambda o: o.logprobs.sum()), (VALUE, lambda o: o.values[:, :-1][rollout.tokens.mask].sum())):
        built.trained.zero_grad()
        pick(built.trained(rollout.tokens)).backward()
        moved = {n for n, p in built.trained.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
        assert any(is_of(n, adapter) for n in moved)
        assert all(is_of(n, adapter) or n.startswith("value_head.") for n in moved)


def test_one_backbone_scores_as_the_reward_model_loaded_alone(place):
    built, rollout, _ = one_update(settings(place, lora=LORA, scorers=[ADAPTER]))
    inside = next(iter(built.scorer.parts.values())).scorer
    assert isinstance(inside, AdapterScorer)
    alone = reward_scorer("reward/adapter", place / "registry")
    prompts = [ids[mask].tolist() for ids, mask in zip(rollout.tokens.prompt_ids, rollout.tokens.prompt_mask, strict=True)]
    completions = [ids[mask].tolist() for ids, mask in zip(rollout.tokens.completion_ids, rollout.tokens.mask, strict=True)]
    expected = alone.score_ids(prompts, completions)
    assert expected.std() > 0.05
    torch.testing.assert_close(inside.score_ids(prompts, completions), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(rollout.scores, expected, atol=1e-5, rtol=0)  # before the update, too
    assert (inside.mean, inside.std) == (alone.mean, alone.std) == (0.3, 2.0)


def test_trap_8_the_reward_adapters_scores_do_not_depend_on_the_batch(place):
    built, rollout, _ = one_update(settings(place, lora=LORA, scorers=[ADAPTER]))
    scorer = next(iter(built.scorer.parts.values())).scorer
    prompts = [ids[mask].tolist() for ids, mask in zip(rollout.tokens.prompt_ids, rollout.tokens.prompt_mask, strict=True)]
    completions = [ids[mask].tolist() for ids, mask in zip(rollout.tokens.completion_ids, rollout.tokens.mask, strict=True)]
    alone = torch.cat([scorer.score_ids([p], [c]) for p, c in zip(prompts, completions, strict=True)])
    for size in (1, 2, 8):
        scorer.batch_size = size
        torch.testing.assert_close(scorer.score_ids(prompts[::-1], completions[::-1]).flip(0), alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("template", ["raw", "plain", "chatml"])
def test_trap_19_the_score_is_read_at_the_eos_that_a_rollout_ends_with(place, template):
    """Whatever a template writes after EOS: ids of a rollout and text of an answer are scored at the same token."""
    publish_policy(place, f"speaks-{template}", template)
    publish_reward(place, f"hears-{template}", base=f"sft/speaks-{template}")
    values = settings(place, init_from=f"sft/speaks-{template}", scorers=[{"kind": "model", "checkpoint": f"reward/hears-{template}"}])
    cfg, accelerator, tokens, built, prompts = assembled(values)
    scorer = next(iter(built.scorer.parts.values())).scorer
    assert scorer.token_key == tokens.key
    said = [tokens.formatter.completion_ids(text, "why") for text in ("because", "no idea at all")]
    assert [ids[-1] for ids in said] == [258, 258]
    by_ids = scorer.score_ids([tokens.formatter.prompt_ids("why")] * 2, said)
    assert scorer(["why", "why"], ["because", "no idea at all"], finished=[True, True]) == pytest.approx(by_ids.tolist(), abs=1e-5)
    beyond = scorer.score_ids([tokens.formatter.prompt_ids("why")] * 2, [[*ids, 198] for ids in said])
    assert (beyond - by_ids).abs().min() > 1e-3, "another position has another score"
    rollout = rollout_of(cfg, accelerator, tokens, built, prompts)
    assert all(ids[mask][-1] == 258 for ids, mask, end in zip(rollout.tokens.completion_ids, rollout.tokens.mask, rollout.finished, strict=True) if end)


def test_one_backbone_the_value_adapter_starts_as_the_centred_reward_adapter(place):
    *_, built, _ = assembled(settings(place, lora=LORA, scorers=[ADAPTER]))
    check_values_are_centred_scores(built, reward_scorer("reward/adapter", place / "registry"))


def check_values_are_centred_scores(built, scorer):
    from tests.unit.ppo_samples import tokens_of

    prompts, completions = [[5, 6, 7], [8]], [[9, 10], [11, 12, 13]]
    with torch.no_grad():
        values = built.trained(tokens_of(prompts, completions, pad=256)).values
    last = torch.stack([values[0, 2], values[1, 3]])  # the value after the last token reads the state the score reads
    torch.testing.assert_close(last, scorer.score_ids(prompts, completions) - 0.3, atol=1e-5, rtol=0)


def test_one_backbone_the_published_adapter_is_the_trained_policy(place):
    """8 prompts: base + adapter, merged by load_policy, and peft's own loading give the logits of the policy in memory."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    seen = {}
    original = ppo_train.train
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo_train, "train", lambda cfg, a, built, *r: (original(cfg, a, built, *r), seen.update(policy=built.trained.policy))[0])
        checkpoint = run(settings(place, "adapter", lora=LORA, scorers=[ADAPTER]))
    merged = models.load_policy(models.find("ppo/adapter", place / "registry"))
    base = Registry(place / "registry").resolve("sft/one")
    unmerged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base.model_dir), checkpoint.model_dir).eval()
    assert {k.split(".lora_")[1][:1] for k in weights(checkpoint)} == {"A", "B"}
    assert not [k for k in weights(checkpoint) if "value" in k or "reward" in k]
    start = models.load_policy(models.find("sft/one", place / "registry"))
    for length in range(2, 10):
        ids = torch.arange(length).unsqueeze(0) * 7 % 256
        with torch.no_grad():
            trained, one, other, before = (m(input_ids=ids).logits for m in (seen["policy"], merged, unmerged, start))
        torch.testing.assert_close(one, trained, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(other, trained, atol=1e-5, rtol=1e-5)
    assert (trained - before).abs().max() > 1e-2
    parents = {(p["role"], p["id"]) for p in checkpoint.manifest["parents"]}
    assert {("init_from", base.id), ("reference", base.id)} <= parents


def test_one_backbone_value_head_starts_at_zero_without_a_reward_model(place):
    *_, built, _ = assembled(settings(place, lora=LORA))
    assert built.trained.value_head.weight.eq(0).all()


def test_one_backbone_on_a_base_that_is_itself_base_and_adapter(place):
    """SFT with adapters, a reward adapter on that, PPO with adapters on that: one backbone all the same."""
    if not Registry(place / "registry").list("ppo", "under"):
        run(settings(place, "under", {"iterations": 1}, lora=LORA))
    publish_reward(place, "above", lora=True, base="ppo/under", seed=8)
    chain = settings(place, "chain", init_from="ppo/under", lora=LORA, scorers=[{"kind": "model", "checkpoint": "reward/above"}])
    *_, built, _ = assembled(chain)
    inside, alone = next(iter(built.scorer.parts.values())).scorer, reward_scorer("reward/above", place / "registry")
    assert isinstance(inside, AdapterScorer)
    rows = [[5, 6, 7], [8]], [[9, 10], [11, 12, 13]]
    torch.testing.assert_close(inside.score_ids(*rows), alone.score_ids(*rows), atol=1e-5, rtol=0)
    run(chain)
    assert metrics(chain)[0]["objective/kl"] == pytest.approx(0, abs=1e-5)
    models.load_policy(models.find("ppo/chain", place / "registry"))


# -- full training


def test_row_17_a_value_copy_starts_as_the_centred_score(place):
    *_, built, _ = assembled(settings(place, scorers=[WHOLE]))
    check_values_are_centred_scores(built, reward_scorer("reward/whole", place / "registry"))
    policy = {p.data_ptr() for p in built.trained.policy.parameters()}
    assert policy.isdisjoint(p.data_ptr() for p in built.trained.value_trunk.parameters())


def test_row_17_full_training_from_adapters_trains_every_weight_of_policy_and_value_function(place):
    """Weights that an adapter was merged into are frozen by peft; full training must thaw them, in both models."""
    run(settings(place, "first", {"iterations": 1}, lora=LORA))
    built, _, before = one_update(settings(place, init_from="ppo/first", scorers=[ADAPTER]))
    after = dict(built.trained.named_parameters())
    still = [name for name in after if torch.equal(after[name], before[name])]
    assert not still


def test_row_17_a_head_on_the_policys_trunk(place):
    built, _, before = one_update(settings(place, value_function="head"))
    assert built.trained.value_trunk is None
    assert before["value_head.weight"].eq(0).all()
    assert built.trained.value_head.weight.abs().sum() > 0


def test_full_training_leaves_reference_and_reward_model_alone(place):
    values = settings(place, scorers=[WHOLE])
    built, rollout, before = one_update(values)
    scorer = next(iter(built.scorer.parts.values())).scorer
    assert not [p for m in (built.reference.model, scorer.model) for p in m.parameters() if p.requires_grad]
    torch.testing.assert_close(built.reference.logprobs(rollout.tokens), rollout.ref_logprobs, atol=1e-5, rtol=0)
    assert not torch.equal(before["policy.model.layers.0.mlp.up_proj.weight"], built.trained.policy.model.layers[0].mlp.up_proj.weight)


def test_full_training_publishes_a_plain_folder_that_loads(place):
    from transformers import AutoModelForCausalLM

    checkpoint = run(settings(place, "plain"))
    loaded = AutoModelForCausalLM.from_pretrained(checkpoint.model_dir)
    assert loaded.generation_config.eos_token_id == 258
    assert loaded.generation_config.top_k in (None, 50)
    assert loaded.config.pad_token_id == 256
    facts, tokens = checkpoint.info("tokenizer"), load_tokens(models.find("sft/one", place / "registry"))
    assert facts == tokens.facts


def test_trap_17_generation_config_of_the_start_is_not_what_samples_nor_what_is_saved(place, tmp_path):
    import shutil

    base = shutil.copytree(place / "base", tmp_path / "greedy")
    (base / "generation_config.json").write_text(json.dumps({"do_sample": False, "top_k": 1, "eos_token_id": 258, "max_new_tokens": 1}))
    before = (base / "generation_config.json").read_bytes()
    values = [settings(place, f"gen{i}", {"iterations": 2}, init_from=str(source), template="raw") for i, source in enumerate((place / "base", base))]
    checkpoints = [run(v) for v in values]
    assert metrics(values[0]) == metrics(values[1])
    assert (base / "generation_config.json").read_bytes() == before
    saved = json.loads((checkpoints[1].model_dir / "generation_config.json").read_text())
    assert not {"top_k", "top_p", "do_sample", "max_new_tokens"} & set(saved)


def test_trap_1_a_base_without_a_pad_token_gets_one_and_still_starts_at_its_reference(place, tmp_path):
    """The new pad token's embedding is drawn for policy and reference: they must draw the same."""
    import shutil

    base = shutil.copytree(place / "base", tmp_path / "padless")
    for name in ("tokenizer_config.json", "tokenizer.json", "config.json"):
        content = json.loads((base / name).read_text())
        if name == "tokenizer_config.json":
            content["pad_token"] = "<eos>"
        (base / name).write_text(json.dumps(content).replace('"<pad>"', '"<odd>"') if name == "tokenizer.json" else json.dumps(content))
    for changes in ({}, {"lora": LORA}):
        values = settings(place, f"padless{len(changes)}", {"iterations": 2}, init_from=str(base), template="raw", sampling={"max_new_tokens": 30, "stop_at_eos": False}, missing_eos="none", **changes)
        checkpoint = run(values)
        facts = checkpoint.info("tokenizer")
        assert facts["pad_id"] not in facts["eos_ids"]
        assert metrics(values)[0]["objective/kl"] == pytest.approx(0, abs=1e-5)
        first, again = (models.load_policy(models.find(checkpoint.ref, place / "registry")) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))


# -- scoring


def test_row_7_a_reward_model_with_another_tokenizer_reads_text_in_its_own_template(place, tmp_path):
    """Its ids are another permutation of the bytes and it speaks chatml: only text can pass between the two."""
    from stages.data import Formatter
    from stages.tokens import ModelTokens, tokenizer_digest
    from tests.tiny import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    symbols = [s for s, _ in sorted(backend["model"]["vocab"].items(), key=lambda item: item[1])]
    backend["model"]["vocab"] = {s: i for i, s in enumerate(symbols[:256][::-1] + symbols[256:])}
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(backend)), pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")
    formatter = Formatter(other, "chatml", [258])
    publish_reward(place, "foreign", tokens=ModelTokens(other, formatter, formatter.facts() | {"digest": tokenizer_digest(other)}, ()))
    foreign = {"kind": "model", "checkpoint": "reward/foreign"}
    cfg, accelerator, tokens, built, prompts = assembled(settings(place, scorers=[foreign]))
    rollout = rollout_of(cfg, accelerator, tokens, built, prompts)
    scorer = reward_scorer("reward/foreign", place / "registry")
    numbers = prompts.chosen(0, 8, cfg.seed)
    expected = []
    for row, number in enumerate(numbers):
        completion = tokens.formatter.completion_text(rollout.tokens.completion_ids[row][rollout.tokens.mask[row]].tolist())
        ids = formatter.completion_ids(completion) if completion else [258]
        ids = ids if bool(rollout.finished[row]) or ids[-1] != 258 else ids[:-1]
        expected.append(scorer.score_ids([formatter.prompt_ids(prompts.texts[number])], [ids]).item())
    assert rollout.scores.tolist() == pytest.approx(expected, abs=1e-5)
    assert built.trained.value_trunk is not None
    with pytest.raises(UserError, match="has another tokenizer"):
        assembled(settings(place, scorers=[foreign], value_init="reward/foreign"))


def test_row_4_row_5_completions_that_were_cut_off_are_told_from_finished_ones(place):
    cfg, accelerator, tokens, built, prompts = assembled(settings(place, "out", {"rollout_batch_size": 32}, sampling={"max_new_tokens": 2}))
    rollout = rollout_of(cfg, accelerator, tokens, built, prompts)
    assert 0 < rollout.finished.sum() < 32
    for ids, mask, finished in zip(rollout.tokens.completion_ids, rollout.tokens.mask, rollout.finished, strict=True):
        assert bool(finished) == (ids[mask][-1].item() == 258)
        assert bool(finished) or mask.sum() == 2
    rewards = experience_of(rollout, cfg, kl_coef=0.0, mean=0.0, std=1.0)[1].sum(dim=1)
    assert rewards[~rollout.finished].eq(-1).all()
    torch.testing.assert_close(rewards[rollout.finished], rollout.scores[rollout.finished])


def test_row_3_the_adaptive_controller_moves_once_per_iteration(place):
    values = settings(place, "adaptive", {"iterations": 4}, adaptive_kl={"target": 50.0, "horizon": 100}, kl_coef=0.1)
    run(values)
    # KL far below 50: the error is clipped at -.2, with 8 samples each step is a factor of 1 - .2 * 8 / 100.
    assert [m["objective/kl_coef"] for m in metrics(values)] == pytest.approx([0.1 * (1 - 0.016) ** i for i in range(4)])


def test_columns_of_the_prompts_reach_the_scorer_and_reserved_names_are_refused(place, tmp_path):
    prompts = tmp_path / "columns.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text, "bonus": i}) + "\n" for i, text in enumerate(PROMPTS)))
    scorer = [{"kind": "python", "function": "tests.stage.ppo_runs:bonus"}]
    cfg, accelerator, tokens, built, loaded = assembled(settings(place, prompts=str(prompts), scorers=scorer))
    rollout = rollout_of(cfg, accelerator, tokens, built, loaded)
    rows = [ids[mask].tolist() for ids, mask in zip(rollout.tokens.prompt_ids, rollout.tokens.prompt_mask, strict=True)]
    assert rollout.scores.tolist() == [rows_of_prompts(tokens).index(row) for row in rows]
    for name in ("finished", "token_key"):
        prompts.write_text(json.dumps({"prompt": "a dog", name: 1}) + "\n")
        with pytest.raises(UserError, match=f"column '{name}'"):
            assembled(settings(place, prompts=str(prompts), scorers=scorer))


def rows_of_prompts(tokens):
    return [tokens.formatter.prompt_ids(text) for text in PROMPTS]


# -- what a person gets wrong


def test_bad_input_a_batch_that_cannot_be_shared_out(place):
    from stages.training.entry import run as command

    config = place / "bad.json"
    values = settings(place, "bad")
    values["train"] = values["train"] | {"rollout_batch_size": 9}
    config.write_text(json.dumps(values))
    with pytest.raises(SystemExit) as left:
        command(main, "ppo", ["--config", str(config)])
    assert left.value.code == 2


@pytest.mark.parametrize("kind", ["DEEPSPEED", "FSDP"])
def test_trap_18_what_would_gather_weights_token_by_token_is_refused(place, kind, monkeypatch):
    accelerator = SimpleNamespace(num_processes=2, distributed_type=f"DistributedType.{kind}")
    monkeypatch.setattr("accelerate.Accelerator", lambda **_: accelerator)
    with pytest.raises(UserError, match="use a DDP machine file"):
        ppo_train.start(PPOStage.model_validate(settings(place)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init_from": "reward/whole"}, "is a checkpoint of stage 'reward', expected 'sft' or 'dpo' or 'ppo'"),
        ({"scorers": [{"kind": "model", "checkpoint": "sft/one"}]}, "is a checkpoint of stage 'sft', expected 'reward'"),
        ({"value_init": "sft/one"}, "is a checkpoint of stage 'sft', expected 'reward'"),
        ({"init_from": "sft/none"}, "sft/none"),
        ({"scorers": [{"kind": "python", "function": "tests.stage.ppo_runs:broken"}]}, "score 0 is nan"),
        ({"max_length": 10}, "leaves no room for a prompt"),
        ({"max_length": 12}, "all 5 rows are longer than"),
        ({"prompts": "nowhere.jsonl"}, "nowhere.jsonl"),
    ],
)
def test_bad_input_is_one_clear_error_and_nothing_is_published(place, changes, message):
    with pytest.raises(UserError, match=message):
        main(PPOStage.model_validate(settings(place, "refused", **changes)))
    assert not Registry(place / "registry").list("ppo", "refused")
