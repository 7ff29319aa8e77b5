"""PPO on a tiny model from end to end: where a run starts, what it trains, what it leaves alone, what it publishes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from configs.errors import UserError
from configs.schema import PPOStage
from stages import models
from stages.ppo.collect import experience_of
from stages.ppo.train import main
from stages.registry import Registry
from stages.scorers import reward_scorer
from stages.tokens import load_tokens
from tests.stage.ppo_runs import (
    ADAPTER,
    LORA,
    PROMPTS,
    WHOLE,
    assembled,
    check_values_are_centred_scores,
    metrics,
    one_update,
    publish_policy,
    publish_reward,
    rollout_of,
    run,
    settings,
    workspace,
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = workspace(tmp_path_factory.mktemp("ppo"))
    publish_policy(folder, "two")  # the same weights, another checkpoint
    publish_reward(folder, "whole")
    publish_reward(folder, "adapter", lora=True, seed=6)
    return folder


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
