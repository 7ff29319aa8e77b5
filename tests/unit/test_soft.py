"""Soft prompts at the trunk: what peft computes, padding and cache that change nothing, folders that load in plain peft, and what is refused."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel, PeftModelForCausalLM
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from configs.errors import UserError
from stages import models, soft
from stages.ppo.forward import hidden_states, token_outputs
from stages.ppo.rollout import padded
from stages.ppo.sampling import completion_seed, left_pad, sample
from stages.soft.training import start, trained_on, tuned
from tests.tiny import tiny_model
from tests.unit.ppo_samples import model_of, ragged_ids, sampling

CPU = torch.device("cpu")
KINDS = {
    "prompt_tuning": {"init_text": None},
    "p_tuning": {"encoder": "mlp", "encoder_hidden_size": 8, "encoder_layers": 2, "encoder_dropout": 0.0},
    "lstm": {"method": "p_tuning", "encoder": "lstm", "encoder_hidden_size": 8, "encoder_layers": 2, "encoder_dropout": 0.0},
    "prefix_tuning": {"prefix_projection": False, "encoder_hidden_size": None},
    "projection": {"method": "prefix_tuning", "prefix_projection": True, "encoder_hidden_size": 8},
}
METHODS = ("prompt_tuning", "p_tuning", "prefix_tuning")


def section(kind: str, n: int = 5, **changes):
    """A `tune:` section."""
    return SimpleNamespace(**{"method": kind, "virtual_tokens": n} | KINDS[kind] | changes)


def soft_model(kind: str = "prompt_tuning", architecture: str = "llama", n: int = 5, **changes):
    """A model under training in eval mode, its encoder far from where it starts."""
    made = tuned(model_of(architecture, **changes), section(kind, n), tokenizer_folder="", seed=0).eval()
    with torch.no_grad():
        for parameter in made.encoder.parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return made


def stacked(kind: str = "prompt_tuning", **changes):
    """The model that PPO and evaluations see: the base model, with its hooks."""
    return soft_model(kind, **changes).get_base_model()


def rows_of(padding: str):
    """Ids and mask [3, 7] of rows of 7, 4 and 2 tokens."""
    ids, mask = left_pad([list(range(3, 10)), [4, 9, 11, 20], [30, 5]], 0, CPU)
    return (ids, mask.long()) if padding == "left" else (ids.flip(1), mask.long().flip(1))


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_peft_at_the_positions_of_the_text(kind, padding, architecture):
    made = soft_model(kind, architecture)
    ids, mask = rows_of(padding)
    ours = made(input_ids=ids, attention_mask=mask, use_cache=False, output_hidden_states=True)
    with made.prompt[0].off():
        theirs = PeftModelForCausalLM.forward(made, input_ids=ids, attention_mask=mask).logits[:, -ids.shape[1] :]
        bare = made(input_ids=ids, attention_mask=mask).logits
    assert ours.logits.shape == (3, 7, 32)
    assert {tuple(states.shape) for states in ours.hidden_states} == {(3, 7, 16)}
    torch.testing.assert_close(ours.logits[mask.bool()], theirs[mask.bool()], atol=1e-5, rtol=1e-5)
    assert (ours.logits - bare)[mask.bool()].abs().max() > 0.01, "the prompt says nothing"


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", METHODS)
def test_padding_on_the_left_changes_nothing_where_positions_leave_it_out(kind, architecture):
    """peft itself gives the text other positions then: its batched generation differs from one row at a time."""
    model = stacked(kind, architecture=architecture)
    ids, mask = rows_of("left")
    found = model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), use_cache=False).logits
    for row, logits, real in zip(ids, found, mask.bool(), strict=True):
        alone = model(input_ids=row[real][None], use_cache=False).logits[0]
        torch.testing.assert_close(logits[real], alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", METHODS)
def test_a_cache_that_holds_the_prompt_gives_the_logits_of_one_pass(kind):
    model = stacked(kind)
    ids = torch.arange(3, 12)[None]
    whole = model(input_ids=ids, use_cache=False).logits
    cache = DynamicCache(config=model.config)
    parts = [model(input_ids=part, past_key_values=cache, use_cache=True).logits for part in ids.split([4, 3, 1, 1], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-5)
    assert cache.get_seq_length() == 9 + 5


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", METHODS)
def test_sampled_log_probs_are_those_of_a_training_forward(kind, architecture):
    """Prompts of different lengths in batches from which ended rows leave; also with random weights where EOS comes soon."""
    model = stacked(kind, architecture=architecture)
    prompts, _ = ragged_ids(9)
    samples = sample(model, prompts, sampling=sampling(generate_batch_size=5), eos_ids=[2, 7, 8, 9], pad_id=0, seeds=[completion_seed(0, 0, i) for i in range(9)])
    assert len({len(s.completion_ids) for s in samples}) > 2, "no row ended before another"
    tokens = padded(prompts, [s.completion_ids for s in samples], 0, CPU)
    found = token_outputs(model, hidden_states(model.base_model, tokens), tokens, temperature=1.0).logprobs
    expected = torch.tensor([x for s in samples for x in s.logprobs])
    torch.testing.assert_close(found[tokens.mask], expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", METHODS)
def test_generate_writes_what_greedy_steps_of_full_passes_write(kind):
    made = soft_model(kind)
    ids, mask = rows_of("left")
    written = made.generate(input_ids=ids, attention_mask=mask, max_new_tokens=5, do_sample=False, eos_token_id=None)[:, 7:]
    for row, real, tokens in zip(ids, mask.bool(), written, strict=True):
        text = row[real][None]
        for _ in range(5):
            text = torch.cat([text, made(input_ids=text, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
        assert text[0, -5:].tolist() == tokens.tolist()


def test_only_the_encoder_learns_and_every_number_of_it_does():
    for kind in KINDS:
        made = soft_model(kind)
        ids, mask = rows_of("right")
        made(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
        learning = {name for name, p in made.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
        assert learning == {name for name, p in made.named_parameters() if p.requires_grad}
        assert all(name.startswith("prompt_encoder.") for name in learning)
        assert made.prompt[0].vectors is None


@pytest.mark.parametrize("kind", ["prompt_tuning", "p_tuning"])
def test_recomputed_activations_give_the_same_gradients(kind):
    gradients = []
    for checkpointing in (False, True):
        made, (ids, mask) = soft_model(kind).train(), rows_of("right")
        if checkpointing:
            made.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
        made(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
        gradients.append([p.grad for p in made.encoder.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on_from_a_save_with_the_very_encoder(kind, tmp_path):
    """peft's file holds what the network makes, not the network, and its load_adapter refuses what is trained."""
    made, again = soft_model(kind), tuned(model_of(), section(kind), tokenizer_folder="", seed=7)
    made.save_pretrained(tmp_path)
    again.load_adapter(tmp_path, "default", is_trainable=True)
    assert all(torch.equal(a, b) for a, b in zip(made.encoder.state_dict().values(), again.encoder.state_dict().values(), strict=True))


# -- folders


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("soft") / "base", initializer_range=0.2)


def published(base, folder, kind: str, **changes):
    """A folder as SFT publishes it, and the model that was trained."""
    origin = models.Origin(str(base), None, None)
    made = tuned(models.load_policy(origin), section(kind, **changes), tokenizer_folder=str(base), seed=3)
    with torch.no_grad():
        next(made.encoder.parameters()).mul_(1.5)
    models.save_model(made, models.load_tokenizer(origin), folder, eos_ids=[258], base=origin)
    return made.eval()


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_plain_peft_loads_the_folder_and_plain_transformers_refuses_it(base, tmp_path, kind):
    made = published(base, tmp_path, kind)
    ids = torch.arange(20)[None]
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path).eval()
    ours = models.load_policy(models.Origin(str(tmp_path), None, None))
    torch.testing.assert_close(plain(input_ids=ids).logits[:, -20:], made(input_ids=ids).logits, atol=1e-5, rtol=1e-5)
    assert torch.equal(ours(input_ids=ids).logits, made(input_ids=ids).logits)
    assert not (tmp_path / soft.ENCODER).exists()
    assert soft.virtual_tokens(tmp_path) == 5
    assert soft.room(ours) == 512 - 5
    with pytest.raises(Exception, match=r"(?i)prompt"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_an_initial_text_is_what_the_vectors_start_as_and_is_not_published(base, tmp_path):
    policy = models.load_policy(models.Origin(str(base), None, None))
    made = tuned(policy, section("prompt_tuning", 8, init_text="abc"), tokenizer_folder=str(base), seed=0)
    ids = models.load_tokenizer(models.Origin(str(base), None, None))("abc")["input_ids"]
    assert torch.equal(made.encoder.embedding.weight, policy.get_input_embeddings().weight[torch.tensor((ids * 8)[:8])].detach())
    made.save_pretrained(tmp_path)
    text = (tmp_path / "adapter_config.json").read_text()
    assert "abc" not in text
    assert json.loads(text)["tokenizer_name_or_path"] is None


@torch.no_grad()
def test_a_child_is_written_under_the_unchanged_prompt_and_loads_as_one(base, tmp_path):
    published(base, tmp_path / "parent", "prefix_tuning")
    origin = models.Origin(str(tmp_path / "parent"), None, None)
    child = models.load_policy(origin)
    child.lm_head.weight.mul_(1.1)
    models.save_model(child, models.load_tokenizer(origin), tmp_path / "child", eos_ids=[258], like=origin)
    again = models.Origin(str(tmp_path / "child"), None, None)
    ids = torch.arange(9)[None]
    assert torch.equal(models.load_policy(again)(input_ids=ids).logits, child(input_ids=ids).logits)
    assert soft.same_prompt(origin, again)
    assert (tmp_path / "child/adapter_model.safetensors").read_bytes() == (tmp_path / "parent/adapter_model.safetensors").read_bytes()
    assert not any("soft" in name for name in AutoModelForCausalLM.from_pretrained(tmp_path / "child/base").state_dict())
    assert [o.folder for o in models.with_bases(again)] == [str(tmp_path / "child"), str(tmp_path / "child/base")]
    with pytest.raises((OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(tmp_path / "child")


@torch.no_grad()
def test_embeddings_that_grew_for_a_pad_token_are_loaded_with_the_prompt(base, tmp_path):
    origin = models.Origin(str(base), None, None)
    policy = models.load_policy(origin)
    models.resize_to(policy, 264)
    made = tuned(policy, section("prompt_tuning"), tokenizer_folder=str(base), seed=3).eval()
    models.save_model(made, models.load_tokenizer(origin), tmp_path, eos_ids=[258], base=origin)
    loaded = models.load_policy(origin)
    models.resize_to(loaded, 264)
    loaded.get_input_embeddings().weight[260] = 7.0  # not as the other was drawn
    soft.attach(loaded, tmp_path)
    ids = torch.tensor([[260, 5, 263]])
    assert torch.equal(loaded(input_ids=ids).logits, made(input_ids=ids).logits)


def going_on(kind: str, **changes):
    """A config that trains a published prompt of this kind on."""
    plain = "prompt_tuning" if kind in ("p_tuning", "lstm") else "prefix_tuning" if kind == "projection" else kind
    return SimpleNamespace(technique=section(plain, **changes), seed=1, train=SimpleNamespace())


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_that_is_trained_on_begins_as_its_parent_to_the_bit(base, tmp_path, kind):
    published(base, tmp_path, kind)
    origin, ids = models.Origin(str(tmp_path), None, None), torch.arange(20)[None]
    made = trained_on(models.load_policy(models.adapter_base(origin)), origin, going_on(kind)).eval()
    assert torch.equal(made(input_ids=ids).logits, models.load_policy(origin)(input_ids=ids).logits)
    assert [name for name, p in made.named_parameters() if p.requires_grad] == ["prompt_encoder.default.embedding.weight"]


def test_a_prompt_is_trained_on_as_no_other_prompt(base, tmp_path):
    published(base, tmp_path, "p_tuning")
    origin = models.Origin(str(tmp_path), None, None)
    for other in (going_on("prefix_tuning"), going_on("p_tuning", n=6), SimpleNamespace(technique=section("p_tuning"))):
        with pytest.raises(UserError, match=r"holds 5 trained vectors \(p_tuning\).* set tune: \{method: prompt_tuning, virtual_tokens: 5\}"):
            trained_on(models.load_policy(models.adapter_base(origin)), origin, other)


# -- what is refused


def test_what_can_not_be_exact_is_refused_by_name(base, tmp_path):
    made = published(base, tmp_path, "prefix_tuning")
    with pytest.raises(UserError, match="two can't be stacked"):
        soft.attach(made.get_base_model(), tmp_path)
    made.get_base_model().gradient_checkpointing_enable()
    made.train()
    with pytest.raises(UserError, match="gradient_checkpointing with prefix tuning"):
        made(input_ids=torch.arange(5)[None])
    model = stacked()
    with pytest.raises(UserError, match="static cache"):
        model(input_ids=torch.arange(3, 6)[None], past_key_values=StaticCache(model.config, 32))
    with pytest.raises(UserError, match=r"virtual_tokens 128: .* has 128 positions"):
        soft_model(n=128)


def test_damaged_folders_are_named(base, tmp_path):
    published(base, tmp_path, "prompt_tuning")
    origin, file = models.Origin(str(tmp_path), None, None), tmp_path / "adapter_config.json"
    found = json.loads(file.read_text())
    for key, value, words in (("num_virtual_tokens", 6, r"expected a soft prompt prompt_embeddings \[6, 32\]"), ("token_dim", None, "not what peft writes"), ("num_transformer_submodules", 2, "not what peft writes")):
        file.write_text(json.dumps(found | {key: value}))
        with pytest.raises(UserError, match=words):
            models.load_policy(origin)
    file.write_text(json.dumps(found))
    with pytest.raises(UserError, match="width 32, and LlamaForCausalLM has embeddings of width 16"):
        soft.attach(model_of(), tmp_path)


CONFLICTS = {
    "packing": ({"packing": True}, "set packing: false"),
    "padding_free": ({"trainer": {"padding_free": True}}, "set packing: false"),
    "vllm": ({"engine": SimpleNamespace(kind="vllm")}, "engine.kind vllm samples without the prompt"),
    "continuous": ({"engine": SimpleNamespace(kind="continuous")}, "engine.kind continuous"),
    "static_cache": ({"engine": SimpleNamespace(kind="generate", static_cache=True)}, "static_cache has no room"),
    "checkpointing": ({"train": SimpleNamespace(gradient_checkpointing=True)}, "gradient_checkpointing recomputes"),
}


@pytest.mark.parametrize("conflict", CONFLICTS)
def test_settings_that_do_not_go_with_a_prompt_are_refused_before_training(base, tmp_path, conflict):
    published(base, tmp_path, "prefix_tuning")
    changes, words = CONFLICTS[conflict]
    cfg = SimpleNamespace(**{"train": SimpleNamespace(gradient_checkpointing=False)} | changes)
    soft.check(SimpleNamespace(train=SimpleNamespace(gradient_checkpointing=False)), models.Origin(str(tmp_path), None, None))
    with pytest.raises(UserError, match=words):
        soft.check(cfg, models.Origin(str(tmp_path), None, None))


def test_a_second_prompt_and_zero_3_are_refused(base, tmp_path, monkeypatch):
    published(base, tmp_path, "prompt_tuning")
    cfg = SimpleNamespace(train=SimpleNamespace(gradient_checkpointing=False), technique=section("p_tuning"), seed=0)
    with pytest.raises(UserError, match=r"has a soft prompt \(prompt_tuning\) already"):
        soft.check(cfg, models.Origin(str(tmp_path), None, None))
    outside = models.Origin(str(base), None, None)
    soft.check(cfg, outside)
    monkeypatch.setattr("stages.zero.machine.zero_stage", lambda: 3)
    with pytest.raises(UserError, match="ZeRO-3"):
        soft.check(cfg, outside)


def test_noise_on_embeddings_is_refused_where_it_would_not_be_found():
    cfg = SimpleNamespace(technique=section("p_tuning"), seed=0, train=SimpleNamespace(neftune_alpha=5.0))
    with pytest.raises(UserError, match=r"neftune_alpha with tune\.method p_tuning"):
        start(model_of("gpt2"), cfg, "")
    start(model_of(), cfg, "")


def test_other_techniques_start_with_the_model_as_it_is():
    model = model_of()
    assert start(model, SimpleNamespace(technique=SimpleNamespace(method="lora"), seed=0), "") is model
