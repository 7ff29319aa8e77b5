"""Sampling: the policy's own distribution and nothing else, the same for any batch, order or share of a process."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from transformers import GenerationConfig

from stages.ppo.collect import PromptSet
from stages.ppo.forward import hidden_states, token_outputs
from stages.ppo.sampling import completion_seed, pick, sample, uniforms_of
from tests.unit.ppo_samples import model_of, ragged_ids, sampling, tokens_of

EOS = [2]


def draw(model, prompts, *, seeds=None, eos=EOS, **settings):
    seeds = range(len(prompts)) if seeds is None else seeds
    return sample(model, prompts, sampling=sampling(**settings), eos_ids=eos, pad_id=0, seeds=list(seeds))


def mixed_model(kind="llama"):
    """A model whose completions end at many different lengths."""
    return model_of(kind, spread=0.15)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_row_22_the_same_tokens_for_any_batch_size_order_and_share_of_processes(kind):
    model, (prompts, _) = mixed_model(kind), ragged_ids(40)
    seeds = [completion_seed(7, 3, i) for i in range(40)]
    whole = draw(model, prompts, seeds=seeds, eos=[2, 3, 4], max_new_tokens=16)
    lengths = {len(s.completion_ids) for s in whole}
    assert len(lengths) > 5, "rows that all leave the batch together prove nothing"
    for size in (1, 3, 16):
        again = draw(model, prompts, seeds=seeds, eos=[2, 3, 4], max_new_tokens=16, generate_batch_size=size)
        assert [s.completion_ids for s in again] == [s.completion_ids for s in whole]
        assert max(abs(a - b) for x, y in zip(again, whole, strict=True) for a, b in zip(x.logprobs, y.logprobs, strict=True)) < 1e-5
    backwards = draw(model, prompts[::-1], seeds=seeds[::-1], eos=[2, 3, 4], max_new_tokens=16)
    assert [s.completion_ids for s in backwards[::-1]] == [s.completion_ids for s in whole]
    shares = [draw(model, prompts[r * 20 : r * 20 + 20], seeds=seeds[r * 20 : r * 20 + 20], eos=[2, 3, 4], max_new_tokens=16) for r in (0, 1)]
    assert [s.completion_ids for share in shares for s in share] == [s.completion_ids for s in whole]


def test_row_22_seeds_differ_between_iterations_completions_and_runs():
    seeds = {completion_seed(s, i, n) for s in range(3) for i in range(50) for n in range(64)}
    assert len(seeds) == 3 * 50 * 64


def test_row_22_every_bit_of_a_seed_counts():
    """Seeds that differ in any one bit draw other numbers, and the same seed draws the same."""
    first = completion_seed(-5, 3, 7)
    assert first.bit_length() > 64
    draws = uniforms_of([first, *(first ^ (1 << bit) for bit in range(128))], 4)
    assert len({tuple(row) for row in draws.tolist()}) == 129
    assert torch.equal(uniforms_of([first], 4)[0], draws[0])
    assert torch.equal(uniforms_of([first], 2)[0], draws[0, :2]), "a longer completion begins with the same draws"
    assert completion_seed(0, 0, 1) != completion_seed(0, 1, 0) != completion_seed(1, 0, 0)
    assert completion_seed(0, 4295, 0) != completion_seed(0, 0, 2**31)
    wide = uniforms_of(range(4000), 5)
    assert abs(float(wide.mean()) - 0.5) < 4 / (12 * 20000) ** 0.5


def test_trap_17_samples_follow_the_softmax_at_the_temperature_and_are_not_greedy():
    """Chi-square of 6,000 first tokens against softmax(logits / .7), with the seeds that a run uses."""
    model, prompt, count = model_of(spread=0.25), [5, 9, 11], 6000
    expected = torch.softmax(model(torch.tensor([prompt])).logits[0, -1].double() / 0.7, dim=-1).tolist()
    rows = draw(model, [prompt] * count, seeds=[completion_seed(0, i % 7, i) for i in range(count)], max_new_tokens=1, temperature=0.7, generate_batch_size=count)
    seen = [0] * 32
    for row in rows:
        seen[row.completion_ids[0]] += 1
    # Cells that expect fewer than 5 are pooled; a chi-square with k - 1 degrees has mean k - 1 and variance 2 (k - 1).
    cells = [(s, count * p) for s, p in zip(seen, expected, strict=True) if count * p >= 5]
    pooled = (count - sum(s for s, _ in cells), count - sum(e for _, e in cells))
    cells += [pooled] if pooled[1] >= 5 else []
    chi, degrees = sum((s - e) ** 2 / e for s, e in cells), len(cells) - 1
    assert degrees >= 8
    assert chi < degrees + 4 * math.sqrt(2 * degrees)
    at_one = torch.softmax(model(torch.tensor([prompt])).logits[0, -1].double(), dim=-1).tolist()
    wrong = sum((s - count * p) ** 2 / (count * p) for s, p in zip(seen, at_one, strict=True))
    assert wrong > degrees + 10 * math.sqrt(2 * degrees), "the test would see a temperature that is not applied"
    assert sum(c > 0 for c in seen) > 8, "greedy decoding would show one token"


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_row_8_the_samplers_log_probs_are_those_of_a_training_forward(kind, temperature):
    model, (prompts, _) = mixed_model(kind), ragged_ids(24)
    rows = draw(model, prompts, temperature=temperature, eos=[2, 3, 4])
    tokens = tokens_of(prompts, [r.completion_ids for r in rows])
    with torch.no_grad():
        out = token_outputs(model, hidden_states(model.base_model, tokens), tokens, temperature=temperature).logprobs
    gap = max(abs(float(out[i, t]) - lp) for i, r in enumerate(rows) for t, lp in enumerate(r.logprobs))
    assert gap < 1e-5


def test_row_6_logits_of_half_precision_are_divided_by_the_temperature_in_float32():
    """As the training forward does; dividing first would round the quotient to 8 bits."""
    model, logits = mixed_model().bfloat16(), []
    model.register_forward_hook(lambda *arguments: logits.append(arguments[-1].logits[:, -1]))
    rows = draw(model, [[5, 6, 7]] * 16, stop_at_eos=False, max_new_tokens=4, temperature=0.7)
    expected = torch.log_softmax(torch.stack(logits, dim=1).float() / 0.7, dim=-1).gather(2, torch.tensor([r.completion_ids for r in rows]).unsqueeze(2))
    torch.testing.assert_close(torch.tensor([r.logprobs for r in rows]), expected.squeeze(2), atol=1e-6, rtol=0)


@pytest.mark.parametrize("vocabulary", [5, 255, 256, 257, 512, 700])
def test_the_token_at_a_quantile_is_that_of_the_cumulative_distribution(vocabulary):
    """One running sum of float64 over the whole vocabulary, as the definition has it, at random quantiles and at both ends."""
    generator = torch.Generator().manual_seed(vocabulary)
    logits = 3 * torch.randn(400, vocabulary, generator=generator)
    logits[:, vocabulary // 2] = logits[200:, 0] = logits[:200, -1] = float("-inf")
    uniforms = torch.rand(400, generator=generator, dtype=torch.float64)
    uniforms[:50], uniforms[50:100] = 0.0, 1.0 - 2.0**-53
    tokens, logprobs = pick(logits.clone(), uniforms)
    exact = torch.log_softmax(logits.double(), dim=1)
    cumulative = exact.exp().cumsum(dim=1)
    low = torch.where(tokens > 0, cumulative.gather(1, (tokens - 1).clamp(min=0).unsqueeze(1)).squeeze(1), 0.0)
    high = cumulative.gather(1, tokens.unsqueeze(1)).squeeze(1)
    assert ((low - 1e-6 <= uniforms) & (uniforms <= high + 1e-6)).all()
    assert ((low <= uniforms) & (uniforms <= high))[100:].float().mean() > 0.99, "rounding may only matter beside a boundary"
    chosen = exact.gather(1, tokens.unsqueeze(1)).squeeze(1)
    assert chosen.isfinite().all(), "a token without probability was sampled"
    torch.testing.assert_close(logprobs.double(), chosen, atol=2e-6, rtol=0)


def test_row_5_a_completion_ends_with_the_first_of_any_eos_id():
    model, (prompts, _) = mixed_model(), ragged_ids(60)
    rows = draw(model, prompts, eos=[2, 9, 30], max_new_tokens=20)
    for row in rows:
        body, last = row.completion_ids[:-1], row.completion_ids[-1]
        assert not {2, 9, 30} & set(body)
        assert row.finished == (last in {2, 9, 30})
        assert row.finished or len(row.completion_ids) == 20
        assert len(row.logprobs) == len(row.completion_ids)
    assert {r.completion_ids[-1] for r in rows if r.finished} == {2, 9, 30}, "every EOS id must have ended some row"


def test_row_5_the_last_token_of_a_full_completion_may_be_the_eos():
    model, prompts = mixed_model(), [[5, 6]] * 300
    rows = draw(model, prompts, eos=[2, 3, 4], max_new_tokens=2)
    exact = [r for r in rows if len(r.completion_ids) == 2]
    assert {r.finished for r in exact} == {True, False}
    assert all(r.finished == (r.completion_ids[-1] in (2, 3, 4)) for r in exact)


def test_row_5_fixed_length_treats_an_eos_like_any_other_token():
    model, (prompts, _) = mixed_model(), ragged_ids(30)
    rows = draw(model, prompts, eos=[2, 3, 4], stop_at_eos=False)
    assert {len(r.completion_ids) for r in rows} == {12}
    assert all(r.finished for r in rows)
    assert any(t in (2, 3, 4) for r in rows for t in r.completion_ids[:-1])
    stopped = draw(model, prompts, eos=[2, 3, 4])
    for long, short in zip(rows, stopped, strict=True):
        assert long.completion_ids[: len(short.completion_ids)] == short.completion_ids


def test_trap_17_a_generation_config_neither_counts_nor_changes():
    prompts, _ = ragged_ids(20)
    plain, bent = mixed_model(), mixed_model()
    bent.generation_config = GenerationConfig(
        do_sample=False, top_k=1, top_p=0.1, temperature=0.01, eos_token_id=[5, 6, 7, 8], max_new_tokens=2, repetition_penalty=9.0, min_new_tokens=5
    )
    before, config = copy.deepcopy(bent.generation_config.to_dict()), copy.deepcopy(bent.config.to_dict())
    assert [r.completion_ids for r in draw(bent, prompts)] == [r.completion_ids for r in draw(plain, prompts)]
    assert bent.generation_config.to_dict() == before
    assert bent.config.to_dict() == config


def test_rows_that_end_leave_the_batch():
    """Half of the rows gone means half of the work gone; that the others do not notice is tested above."""
    model, sizes = mixed_model(), []
    model.get_output_embeddings().register_forward_hook(lambda _, inputs, __: sizes.append(inputs[0].shape[0]))
    rows = draw(model, ragged_ids(32)[0], eos=[2, 3, 4, 5, 6, 7, 8, 9], max_new_tokens=40)
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == 32
    assert sizes[-1] <= 4
    assert len(sizes) == max(len(r.completion_ids) for r in rows), "one forward per token, and none after the last row has ended"


def test_a_model_in_training_mode_is_refused():
    with pytest.raises(AssertionError, match="eval mode"):
        draw(mixed_model().train(), [[5]])


# -- the stream of prompts


def prompt_set(count):
    return PromptSet([[i] for i in range(count)], [str(i) for i in range(count)], [{} for _ in range(count)])


@pytest.mark.parametrize(("count", "batch"), [(3, 8), (5, 5), (7, 4), (1, 6), (12, 4)])
def test_trap_16_any_set_fills_any_batch_and_each_prompt_is_seen_once_per_epoch(count, batch):
    prompts = prompt_set(count)
    stream = [n for iteration in range(count * 2) for n in prompts.chosen(iteration, batch, seed=5)]
    assert len(stream) == count * 2 * batch
    for epoch in range(len(stream) // count):
        assert sorted(stream[epoch * count : (epoch + 1) * count]) == list(range(count))


def test_row_22_the_stream_is_a_function_of_seed_and_iteration():
    prompts = prompt_set(10)
    later = prompts.chosen(4, 4, seed=1)
    stream = [n for iteration in range(6) for n in prompt_set(10).chosen(iteration, 4, seed=1)]
    assert stream[16:20] == later == prompt_set(10).chosen(4, 4, seed=1)
    assert stream[:10] != stream[10:20], "another order in the next epoch"
    assert stream != [n for iteration in range(6) for n in prompts.chosen(iteration, 4, seed=2)]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_row_5_stopping_at_eos_samples_what_a_fixed_length_cut_at_the_first_eos_does(kind):
    """N+ and LM-HP sample every completion to its full length and cut it afterwards. Every position has noise of its own and no row
    sees another, so what comes after an EOS can't reach what came before: stopping there gives the same ids, log-probs and endings."""
    model, (prompts, _) = mixed_model(kind), ragged_ids(40)
    eos = [2, 3, 4]
    seeds = [completion_seed(7, 3, i) for i in range(40)]
    stopped = draw(model, prompts, seeds=seeds, eos=eos, max_new_tokens=16)
    fixed = draw(model, prompts, seeds=seeds, eos=eos, max_new_tokens=16, stop_at_eos=False)
    assert all(len(s.completion_ids) == 16 for s in fixed)
    cut_short = 0
    for one, whole in zip(stopped, fixed, strict=True):
        end = next((i + 1 for i, token in enumerate(whole.completion_ids) if token in eos), None)
        assert one.completion_ids == whole.completion_ids[:end]
        assert one.logprobs == pytest.approx(whole.logprobs[:end], abs=1e-5)
        assert one.finished == (end is not None)
        cut_short += end is not None and end < 16
    assert cut_short > 5
    assert not all(s.finished for s in stopped), "rows without an EOS are what the missing-EOS rule is for"
