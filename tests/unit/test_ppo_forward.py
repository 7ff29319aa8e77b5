"""Log-probs, entropy and values: what the models' own logits say, in any batch, in any chunk, and nothing larger kept."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from configs.errors import UserError
from stages import dropout, models
from stages.loss import logprobs
from stages.ppo import forward, maths, support
from stages.ppo.modules import PolicyAndValue, Reference
from stages.ppo.rollout import Tokens, cut
from tests.unit.ppo_samples import model_of, ragged_ids, tokens_of

KINDS = ["llama", "gpt2"]


def module_of(kind, *, temperature=1.0, trunk=False):
    model = model_of(kind)
    value = model_of(kind, seed=1) if trunk else model
    head = models.scalar_head(16, seed=0)
    return PolicyAndValue(model, value.base_model if trunk else None, head, temperature=temperature)


def expected_logprobs(model, prompt, completion, temperature):
    """log softmax of the model's own logits, one unpadded row at a time."""
    logits = model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1] / temperature
    return torch.log_softmax(logits, dim=-1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [None, 5])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_row_6_trap_6_log_probs_are_those_of_the_models_own_logits_at_the_temperature(kind, chunk, temperature, monkeypatch):
    if chunk:
        monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", 32 * chunk)
    model = model_of(kind)
    prompts, completions = ragged_ids(6)
    tokens = tokens_of(prompts, completions)
    hidden = forward.hidden_states(model.base_model, tokens)
    out = forward.token_outputs(model, hidden, tokens, temperature=temperature)
    out.logprobs.sum().backward()
    with torch.no_grad():
        again = forward.token_outputs(model, hidden, tokens, temperature=temperature, entropy=True)
    torch.testing.assert_close(again.logprobs, out.logprobs, atol=1e-6, rtol=0)
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    total = 0.0
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        full = expected_logprobs(model, prompt, completion, temperature)
        chosen = full.gather(1, torch.tensor(completion).unsqueeze(1)).squeeze(1)
        torch.testing.assert_close(out.logprobs[row, : len(completion)], chosen, atol=1e-5, rtol=0)
        torch.testing.assert_close(again.entropy[row, : len(completion)], -(full.exp() * full).sum(-1), atol=1e-5, rtol=0)
        assert out.logprobs[row, len(completion) :].eq(0).all()
        total = total + chosen.sum()
    total.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kept", [False, True])
def test_trap_13_logits_exist_for_completion_tokens_only_and_a_chunk_at_a_time(kept, monkeypatch):
    """The output head sees each real completion token once a pass, and never more rows at once than a chunk holds.

    Probabilities are kept for the gradient up to a bound on those of a micro-batch.
    """
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", 32 * 4)
    monkeypatch.setattr(logprobs, "KEPT_ELEMENTS", 32 * 1000 if kept else 32 * 20)
    model = model_of()
    prompts, completions = ragged_ids(9, prompt=(5, 30))
    tokens = tokens_of(prompts, completions)
    seen = []
    model.get_output_embeddings().register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[:-1].numel()))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        hidden = forward.hidden_states(model.base_model, tokens)
        trunk = len(saved)
        out = forward.token_outputs(model, hidden, tokens, temperature=1.0)
    real = int(tokens.mask.sum())
    assert real > 20
    assert max(seen) == 4
    assert sum(seen) == real
    large = [size for size in saved[trunk:] if size >= 4 * 32 and size not in (hidden.numel(), model.lm_head.weight.numel(), real * 16)]
    assert sum(large) == (real // 4 * 4 * 32 if kept else 0), "beyond the bound logits of a chunk are recomputed, not kept"
    out.logprobs.sum().backward()
    assert max(seen) == 4
    assert sum(seen) == (1 if kept else 2) * real


@pytest.mark.parametrize(("trained", "kept"), [(False, 0), (True, 0), (True, 1000)])
@pytest.mark.parametrize("rows", [1, 3, 100])
def test_trap_13_the_gradient_without_logits_is_autograds(trained, kept, rows, monkeypatch):
    """A head with a bias and a scale, frozen under adapters or trained, in chunks of any size: values and gradients."""
    monkeypatch.setattr(logprobs, "KEPT_ELEMENTS", kept)
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", 11 * rows)
    torch.manual_seed(0)
    head = nn.Linear(6, 11)
    head.requires_grad_(trained)
    states, ids, pull = torch.randn(7, 6, requires_grad=True), torch.randint(0, 11, (7,)), torch.randn(7)
    factor = 0.6 / 1.7
    expected = torch.log_softmax(head(states) * factor, dim=-1).gather(1, ids.unsqueeze(1)).squeeze(1)
    leaves = [states, *(p for p in head.parameters() if trained)]
    theirs = torch.autograd.grad((expected * pull).sum(), leaves)
    found = logprobs.chosen_logprobs(head, states, ids, lambda part: head(part) * factor, factor)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    for ours, other in zip(torch.autograd.grad((found * pull).sum(), leaves), theirs, strict=True):
        torch.testing.assert_close(ours, other, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("trained", [False, True])
def test_trap_13_the_gradient_without_logits_rounds_as_autocast_does(trained):
    """bf16 products over float32 weights: as far from float32 as autograd is, and float32 gradients for float32 weights."""
    torch.manual_seed(0)
    head = nn.Linear(64, 200, bias=False)
    head.requires_grad_(trained)
    states, ids = torch.randn(30, 64, requires_grad=True), torch.randint(0, 200, (30,))
    plain = lambda: torch.log_softmax(head(states).float(), dim=-1).gather(1, ids.unsqueeze(1)).sum()  # noqa: E731
    leaves = [states, *(p for p in head.parameters() if trained)]
    exact = torch.autograd.grad(plain(), leaves)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        theirs = plain()
        ours = logprobs.chosen_logprobs(head, states, ids, lambda part: head(part).float(), 1.0).sum()
    for mine, other, true in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves), exact, strict=True):
        assert mine.dtype == torch.float32
        assert (mine - true).norm() < 1.5 * (other - true).norm()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trunk", [False, True])
def test_row_20_a_batch_of_one_gives_what_a_batch_of_many_gives(kind, trunk):
    module = module_of(kind, trunk=trunk)
    prompts, completions = ragged_ids(8, prompt=(1, 20))
    together = module(tokens_of(prompts, completions), entropy=True)
    gap = 0.0
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        alone, n = module(tokens_of([prompt], [completion]), entropy=True), len(completion)
        for one, many in ((alone.logprobs, together.logprobs), (alone.values[:, : n + 1], together.values[:, : n + 1]), (alone.entropy, together.entropy)):
            gap = max(gap, (one[0] - many[row, : one.shape[1]]).abs().max().item())
    assert gap < 1e-5
    assert together.values[:, 0].std() > 0.01, "values that are all alike prove nothing"


@pytest.mark.parametrize("kind", KINDS)
def test_row_20_what_the_padding_holds_does_not_matter(kind):
    module = module_of(kind, trunk=True)
    prompts, completions = ragged_ids(6)
    tokens, other = tokens_of(prompts, completions), tokens_of(prompts, completions, pad=17)
    assert (tokens.input_ids != other.input_ids).any()
    clean, dirty = module(tokens), module(other)
    real = torch.cat([tokens.mask, torch.zeros_like(tokens.mask[:, :1])], dim=1)
    torch.testing.assert_close(clean.logprobs, dirty.logprobs, atol=1e-6, rtol=0)
    torch.testing.assert_close(clean.values[real], dirty.values[real], atol=1e-6, rtol=0)


def test_row_20_every_row_begins_at_position_0():
    tokens = tokens_of([[5, 6, 7], [5]], [[8], [9, 9]])
    left = tokens.flush_left()
    assert left.shape == (2, 4), "no column that only padding uses"
    assert (left[0].tolist(), left[1, :3].tolist()) == ([5, 6, 7, 8], [5, 9, 9])
    assert tokens.attention_mask.tolist() == [[1, 1, 1, 1, 0], [0, 0, 1, 1, 1]]


def test_cutting_rows_drops_columns_of_padding_only():
    tokens = tokens_of([[5, 6, 7], [5]], [[8], [9, 9]])
    short = cut(tokens, torch.tensor([0]))
    assert (short.prompt_ids.tolist(), short.completion_ids.tolist()) == ([[5, 6, 7]], [[8]])
    other = cut(tokens, torch.tensor([1]))
    assert (other.prompt_ids.tolist(), other.completion_ids.tolist()) == ([[5]], [[9, 9]])
    empty = Tokens(torch.tensor([[5]]), torch.tensor([[True]]), torch.tensor([[0, 0]]), torch.tensor([[False, False]])).trimmed()
    assert empty.mask.shape == (1, 1), "a row without tokens keeps one masked column"


def test_row_21_a_batch_without_any_token_has_log_probs_zero():
    module = module_of("llama")
    out = module(Tokens(torch.tensor([[5]]), torch.tensor([[True]]), torch.tensor([[0]]), torch.tensor([[False]])))
    assert out.logprobs.tolist() == [[0.0]]
    assert out.values.shape == (1, 2)


class Echo(nn.Module):
    """A trunk whose hidden state at a position is the token that was read there."""

    def forward(self, input_ids, **_):
        return type("Out", (), {"last_hidden_state": input_ids.float().unsqueeze(-1)})


def test_trap_5_the_value_before_a_token_reads_the_state_before_it():
    """values[:, t] is what is expected before completion token t: the state at the prompt's end, then at each token."""
    head = nn.Linear(1, 1)
    head.weight.data.fill_(1.0)
    head.bias.data.zero_()
    module = PolicyAndValue(model_of(), Echo(), head, temperature=1.0)
    values = module(tokens_of([[11, 12], [13]], [[21, 22, 23], [24]])).values
    assert values[0].tolist() == [12, 21, 22, 23]
    assert values[1, :2].tolist() == [13, 24]


def test_trap_7_a_head_starts_with_standard_deviation_one_over_root_of_d_plus_one():
    head = models.scalar_head(4095, seed=0)
    # 1 / sqrt(4096) = 1/64; the standard error of the estimate over 4095 draws is 1.1 %, 1/(d + 1) would be 64 times smaller.
    assert head.weight.std().item() == pytest.approx(1 / 64, rel=0.05)
    assert head.bias.item() == 0
    assert models.scalar_head(8, seed=0, zero=True).weight.eq(0).all()
    assert torch.equal(models.scalar_head(8, seed=3).weight, models.scalar_head(8, seed=3).weight)


DROPOUTS = {  # architectures by where they keep a dropout rate: modules, numbers on modules, the config
    "gpt2": dict(n_embd=16, n_layer=1, n_head=2, n_positions=32),
    "llama": dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, attention_dropout=0.5),
    "opt": dict(hidden_size=16, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=32, word_embed_proj_dim=16, layerdrop=0.5),
    "starcoder2": dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, residual_dropout=0.5, embedding_dropout=0.5),
    "bloom": dict(hidden_size=16, n_layer=1, n_head=2, hidden_dropout=0.5, attention_dropout=0.5),
    "biogpt": dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=32),
    "xglm": dict(d_model=16, ffn_dim=16, num_layers=1, attention_heads=2, max_position_embeddings=32),
}  # fmt: skip


@pytest.mark.parametrize("name", DROPOUTS)
def test_row_19_dropout_is_switched_off_wherever_it_hides_and_asserted(name):
    from transformers import AutoConfig, AutoModelForCausalLM

    tokens = dict(vocab_size=32, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **tokens, **DROPOUTS[name]))
    ids = torch.arange(3, 19).reshape(2, 8)

    def forward():
        return model(input_ids=ids).logits.log_softmax(-1)

    assert any(not torch.equal(forward(), forward()) for _ in range(5)), "a model without dropout proves nothing"
    with pytest.raises(AssertionError, match="dropout is on"):
        dropout.check_no_dropout(model, forward)
    dropout.without_dropout(model)
    dropout.check_no_dropout(model, forward)
    assert not model.training
    model.train()
    assert all(torch.equal(forward(), forward()) for _ in range(5))


def test_row_19_noise_under_any_other_name_is_refused():
    model = model_of()
    model.lm_head.register_forward_hook(lambda module, _, out: out + module.training * torch.randn_like(out))
    with pytest.raises(UserError, match="differ by"):
        dropout.check_no_dropout(model, lambda: model(input_ids=torch.arange(3, 9)[None]).logits)


def test_the_reference_divides_by_the_temperature_too():
    prompts, completions = ragged_ids(4)
    tokens = tokens_of(prompts, completions)
    module = module_of("llama", temperature=0.7)
    with torch.no_grad():
        policy = module(tokens).logprobs
    reference = Reference(module.policy, temperature=0.7).logprobs(tokens)
    assert torch.equal(policy, reference)
    assert not torch.allclose(reference, Reference(module.policy, temperature=1.0).logprobs(tokens), atol=1e-2)


def test_trap_3_trap_11_the_kl_is_zero_at_the_reference_and_grows_when_the_policy_moves_away():
    """k1 of the policy's own samples is an estimate of a divergence: positive once the policy has moved."""
    from stages.ppo.sampling import sample
    from tests.unit.ppo_samples import sampling

    policy, reference = model_of(seed=0), model_of(seed=0)
    prompts = [[5, 6, 7]] * 200
    for moved in (False, True):
        if moved:
            with torch.no_grad():
                for p in policy.parameters():
                    p.add_(0.03 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
        rows = sample(policy, prompts, sampling=sampling(stop_at_eos=False), eos_ids=[2], pad_id=0, seeds=range(200))
        tokens = tokens_of(prompts, [r.completion_ids for r in rows])
        now, then = Reference(policy, temperature=1.0).logprobs(tokens), Reference(reference, temperature=1.0).logprobs(tokens)
        kl = maths.k1(now, then, tokens.mask).sum(1)
        if not moved:
            assert kl.abs().max() == 0
    assert kl.mean() > 3 * kl.std() / 200**0.5


def test_an_architecture_with_another_output_is_refused():
    model = model_of()
    support.prove(model)
    model.config.logit_scale = 0.5
    with pytest.raises(UserError, match="hidden states differ from its own"):
        support.prove(model)


def test_row_20_an_architecture_that_reads_padding_is_refused(monkeypatch):
    model = model_of()
    original = model.model.forward

    def looking_ahead(*a, **k):
        out = original(*a, **k)
        out.last_hidden_state = out.last_hidden_state + (0 if k["use_cache"] else out.last_hidden_state.mean(dim=1, keepdim=True))
        return out

    monkeypatch.setattr(model.model, "forward", looking_ahead)
    monkeypatch.setattr(support, "prove_head", lambda model: None)
    with pytest.raises(UserError, match="a row with padding after it has other logits than alone"):
        support.prove(model)


def test_row_20_an_architecture_whose_cache_forgets_the_padding_is_refused(monkeypatch):
    """Right in a forward pass, wrong from the second sampled token on."""
    model = model_of()
    original = model.model.forward

    def forgetful(*a, attention_mask=None, use_cache=None, **k):
        later = use_cache and k["input_ids"].shape[1] == 1
        return original(*a, attention_mask=None if later else attention_mask, use_cache=use_cache, **k)

    monkeypatch.setattr(model.model, "forward", forgetful)
    with pytest.raises(UserError, match="what it samples has other log-probs"):
        support.prove(model)


def test_row_5_an_architecture_without_a_cache_that_can_be_cut_is_refused():
    from transformers import MambaConfig, MambaForCausalLM

    with pytest.raises(UserError, match="MambaForCausalLM can't sample rows of different lengths together"):
        support.prove(MambaForCausalLM(MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1)).eval())


def test_the_rows_that_prove_sampling_do_not_end_together():
    model = model_of(spread=1.0)
    rows, seeds = support.short_rows(model), [support.completion_seed(0, 0, i) for i in (0, 1)]
    free = support._sample(model, rows, seeds, [])
    ended = support._sample(model, rows, seeds, free[0].completion_ids[:1])
    assert len(ended[1].completion_ids) > len(ended[0].completion_ids) == 1


@pytest.mark.parametrize("name", ["cohere", "granite", "gemma2"])
def test_architectures_that_scale_or_cap_their_logits_are_reproduced(name):
    import transformers as tf

    sizes = dict(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, vocab_size=32, head_dim=8,
        initializer_range=0.5, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = {
        "cohere": lambda: tf.CohereForCausalLM(tf.CohereConfig(**sizes, logit_scale=0.3)),
        "granite": lambda: tf.GraniteForCausalLM(tf.GraniteConfig(**sizes, logits_scaling=3.0)),
        "gemma2": lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**sizes, final_logit_softcapping=0.5)),
    }[name]().eval()
    support.prove(model)
    prompts, completions = ragged_ids(2)
    tokens = tokens_of(prompts, completions)
    with torch.no_grad():
        out = forward.token_outputs(model, forward.hidden_states(model.base_model, tokens), tokens, temperature=1.0).logprobs
        full = expected_logprobs(model, prompts[0], completions[0], 1.0)
    chosen = full.gather(1, torch.tensor(completions[0]).unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(out[0, : len(chosen)], chosen, atol=1e-4, rtol=0)
