"""Sampling completions so that one does not depend on which others share its batch, its process, or its machine.

Every completion has a seed of its own; its uniforms are drawn from that seed alone and turned into tokens by the inverse
of the cumulative distribution. A run on two processes therefore samples what a run on one does, and a resumed iteration
samples what the interrupted one did. No generation config is consulted: no top-k, no top-p, no forgotten default.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from configs.schema import Sampling
from stages.onednn import widened
from stages.training import watchdog

BLOCK = 256  # tokens of the vocabulary whose probabilities are summed up before one of them is looked for


class Sample(NamedTuple):
    """One completion: the sampled ids, their log-probs in nats at the sampling temperature, and whether an EOS ended it.

    entropies: of the distributions that the ids came from, nats; none from engines that don't know them.
    """

    completion_ids: list[int]
    logprobs: list[float]
    finished: bool
    entropies: list[float] | None = None


def completion_seed(seed: int, iteration: int, index: int) -> int:
    """The seed of completion `index` of an iteration: 128 bits, distinct for distinct arguments, the same on any process."""
    assert 0 <= iteration < 2**32, iteration
    assert 0 <= index < 2**32, index
    return (seed % 2**64) << 64 | iteration << 32 | index


def left_pad(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device, widen: Callable[[int], int] = int) -> tuple[Tensor, Tensor]:
    """Left-pad ids to `widen` of the longest: ids [B, P] and mask [B, P], True on real tokens."""
    width = widen(max((len(row) for row in rows), default=0))
    pads = [width - len(row) for row in rows]
    ids = torch.tensor([[pad_id] * before + list(row) for before, row in zip(pads, rows, strict=True)], dtype=torch.long).reshape(len(rows), width)
    mask = torch.arange(width) >= torch.tensor(pads, dtype=torch.long).unsqueeze(1)
    return ids.to(device), mask.to(device)


def uniforms_of(seeds: Sequence[int], length: int) -> Tensor:
    """[B, length] uniforms in [0, 1), each row from its own seed of up to 128 bits.

    Philox (Salmon et al. 2011) takes all of them as its key; PyTorch's generator on the CPU would use the low 32.
    """
    return torch.from_numpy(np.stack([np.random.Generator(np.random.Philox(key=seed)).random(length) for seed in seeds]))


def pick(logits: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens and log-probs of `draw`."""
    return draw(logits, uniforms)[:2]


def draw(logits: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [B] at the given quantiles of softmax(logits [B, V] in float32), their log-probs [B] and the distributions' entropies [B].

    Sums up blocks of the vocabulary first and then single tokens of the block that holds the quantile: running sums of all V
    tokens in float64 took most of the time of sampling at 32,000 words.
    """
    weights = torch.softmax(logits, dim=1)
    ends = _block_sums(weights).double().cumsum(dim=1)
    threshold = uniforms.unsqueeze(1) * ends[:, -1:]
    block = _first_above(ends, threshold)
    before = torch.where(block > 0, ends.gather(1, (block - 1).clamp(min=0)), 0.0)
    inside = block * BLOCK + torch.arange(BLOCK, device=logits.device)
    found = weights.gather(1, inside.clamp(max=weights.shape[1] - 1)).double()
    steps = torch.where(inside < weights.shape[1], found, 0.0).cumsum(dim=1)
    tokens = (block * BLOCK + _first_above(steps, threshold - before)).clamp(max=weights.shape[1] - 1)
    # Log-sum-exp from what there is: the largest probability is exp(largest logit) over that sum.
    normaliser = logits.amax(dim=1, keepdim=True) - weights.amax(dim=1, keepdim=True).log()
    entropies = normaliser.squeeze(1) - torch.linalg.vecdot(weights, logits)
    return tokens.squeeze(1), (logits.gather(1, tokens) - normaliser).squeeze(1), entropies


def most_probable(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same three of logits [B, V] for the most probable token (of equals the first)."""
    logprobs = torch.log_softmax(logits, dim=1)
    best = logprobs.max(dim=1)
    return best.indices, best.values, -torch.linalg.vecdot(logprobs.exp(), logprobs)


def _block_sums(weights: Tensor) -> Tensor:
    """Sums of BLOCK neighbouring columns of [B, V], and of what is left of them at the end."""
    whole = weights.shape[1] // BLOCK * BLOCK
    sums = weights[:, :whole].unflatten(1, (-1, BLOCK)).sum(dim=2) if whole else weights[:, :0]
    return sums if whole == weights.shape[1] else torch.cat([sums, weights[:, whole:].sum(dim=1, keepdim=True)], dim=1)


def _first_above(ends: Tensor, threshold: Tensor) -> Tensor:
    """The first column [B, 1] of non-decreasing `ends` [B, N] above the threshold [B, 1].

    Rounding may leave none: it is then the column that reaches the largest, which like every column found has added something.
    """
    below_last = torch.nextafter(ends[:, -1:], torch.zeros_like(threshold))
    return torch.searchsorted(ends, torch.minimum(threshold, below_last), right=True).clamp(max=ends.shape[1] - 1)


@torch.no_grad()
def sample(
    model: PreTrainedModel, prompt_ids: Sequence[Sequence[int]], *, sampling: Sampling, eos_ids: Sequence[int], pad_id: int,
    seeds: Sequence[int], greedy: bool = False,
) -> list[Sample]:  # fmt: skip
    """Sample one completion for each prompt, in order. `prompt_ids` are unpadded; `seeds` has one entry per prompt. `greedy`: the most
    probable token is taken instead, whatever the seed; log-probs are at temperature 1.

    With `sampling.stop_at_eos` false an EOS is a token like any other, every completion has `max_new_tokens` tokens and
    counts as finished.
    """
    assert len(prompt_ids) == len(seeds), "one seed per prompt"
    if model.training:
        raise AssertionError("sampling needs the model in eval mode: dropout would make log-probs irreproducible")
    order = sorted(range(len(prompt_ids)), key=lambda i: len(prompt_ids[i]), reverse=True)
    results: list[Sample | None] = [None] * len(prompt_ids)
    for start in range(0, len(order), sampling.generate_batch_size):
        batch = order[start : start + sampling.generate_batch_size]
        completions = _sample_batch(model, [prompt_ids[i] for i in batch], sampling, set(eos_ids), pad_id, [seeds[i] for i in batch], greedy)
        for i, completion in zip(batch, completions, strict=True):
            results[i] = completion
    return [result for result in results if result is not None]


def _sample_batch(
    model: PreTrainedModel, prompts: list[Sequence[int]], sampling: Sampling, eos_ids: set[int], pad_id: int, seeds: list[int], greedy: bool
) -> list[Sample]:
    """One batch with a key-value cache; rows that have ended leave the batch when half of it has."""
    device = next(model.parameters()).device
    ids, mask = left_pad(prompts, pad_id, device, partial(widened, model=model))
    uniforms = uniforms_of(seeds, sampling.max_new_tokens).to(device)
    eos = torch.tensor(sorted(eos_ids), device=device, dtype=torch.long)
    tokens = torch.full((len(prompts), sampling.max_new_tokens), pad_id, device=device)
    logprobs, entropies = (torch.zeros((len(prompts), sampling.max_new_tokens), device=device) for _ in range(2))
    lengths = torch.full((len(prompts),), sampling.max_new_tokens, device=device)
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    alive = torch.arange(len(prompts), device=device)
    cache, attention, inputs = DynamicCache(config=model.config), mask.long(), ids
    positions = (attention.cumsum(dim=1) - 1).clamp(min=0)
    for step in range(sampling.max_new_tokens):
        watchdog.beat()
        out = model(
            input_ids=inputs, attention_mask=attention, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        logits = out.logits[:, -1].float()
        found = most_probable(logits) if greedy else draw(logits / sampling.temperature, uniforms[alive, step])
        picked, logprobs[alive, step], entropies[alive, step] = found
        tokens[alive, step] = picked
        if sampling.stop_at_eos:
            now = torch.isin(picked, eos) & ~ended[alive]
            ended[alive[now]], lengths[alive[now]] = True, step + 1
            running = ~ended[alive]
            if not running.any():
                break
            left = widened(int(running.sum()), model)
            if left <= len(alive) // 2:
                keep = torch.argsort(~running, stable=True)[:left].sort().values
                cache.batch_select_indices(keep)
                alive, attention, positions, picked = alive[keep], attention[keep], positions[keep], picked[keep]
        inputs, positions = picked.unsqueeze(1), positions[:, -1:] + 1
        attention = torch.cat([attention, attention.new_ones(len(alive), 1)], dim=1)
    finished = ended.tolist() if sampling.stop_at_eos else [True] * len(prompts)
    rows = zip(lengths.tolist(), tokens.tolist(), logprobs.tolist(), entropies.tolist(), finished, strict=True)
    return [Sample(ids[:n], scores[:n], end, spread[:n]) for n, ids, scores, spread, end in rows]
