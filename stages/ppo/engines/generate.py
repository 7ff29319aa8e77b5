"""Transformers' `generate`, with our random numbers: for architectures whose generation is more than a plain loop.

`generate` chooses greedily among scores in which only the token that we drew is left. So the draw of a completion is a function of
its own seed, as in the native engine; no top-k, top-p or forgotten default counts; and of each step's [B, V] log-probs one number
per row is kept, where `output_logits` would keep [B, T, V].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StaticCache

from stages.ppo.engines.protocol import Policy, checked
from stages.ppo.sampling import Sample, completion_seed, left_pad, pick, uniforms_of


class Draw(LogitsProcessor):
    """Draws one token per row at the temperature, notes its log-prob, and rules out every other one."""

    def __init__(self, uniforms: Tensor, temperature: float, prompt_width: int) -> None:
        self.uniforms, self.temperature, self.prompt_width = uniforms, temperature, prompt_width
        self.logprobs = torch.zeros(uniforms.shape, dtype=torch.float32, device=uniforms.device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """[B, V] scores with 0 at the drawn token and -inf elsewhere; `scores` are the model's logits."""
        step = input_ids.shape[1] - self.prompt_width
        tokens, self.logprobs[:, step] = pick(scores.float() / self.temperature, self.uniforms[:, step])
        return torch.full_like(scores, float("-inf")).scatter_(1, tokens.unsqueeze(1), 0.0)


class OneTypeCache(StaticCache):
    """A static cache that takes what autocast mixes: keys in float32 (rotary embeddings) beside values in bf16."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store both in the arithmetic of attention under autocast, which would round the keys itself."""
        device = key_states.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else key_states.dtype
        return super().update(key_states.to(dtype), value_states.to(dtype), *args, **kwargs)


@contextmanager
def generation_config(model: Any, config: GenerationConfig) -> Iterator[None]:
    """Within the block `config` is the model's own: transformers fills from that one whatever a given config leaves open."""
    own, model.generation_config = model.generation_config, config
    try:
        yield
    finally:
        model.generation_config = own


class GenerateEngine:
    """Batches of `sampling.generate_batch_size` prompts of similar length through `generate`."""

    def __init__(self, policy: Policy, *, static_cache: bool = False) -> None:
        self.policy, self.static_cache = policy, static_cache

    def sample(self, prompt_ids: Sequence[Sequence[int]], *, iteration: int, indices: Sequence[int]) -> list[Sample]:
        """One completion for each prompt; see `Engine`."""
        p = self.policy
        order = sorted(range(len(prompt_ids)), key=lambda i: len(prompt_ids[i]))
        results: dict[int, Sample] = {}
        for start in range(0, len(order), p.sampling.generate_batch_size):
            batch = order[start : start + p.sampling.generate_batch_size]
            seeds = [completion_seed(p.seed, iteration, indices[i]) for i in batch]
            results |= zip(batch, self._batch([prompt_ids[i] for i in batch], seeds), strict=True)
        return checked("generate", [results[i] for i in range(len(prompt_ids))], p)

    def sync(self) -> None:
        """Nothing to do: the weights are the policy's."""

    @torch.no_grad()
    def _batch(self, prompts: list[Sequence[int]], seeds: list[int]) -> list[Sample]:
        p, sampling = self.policy, self.policy.sampling
        ids, mask = left_pad(prompts, p.pad_id, next(p.model.parameters()).device)
        draw = Draw(uniforms_of(seeds, sampling.max_new_tokens).to(ids.device), sampling.temperature, ids.shape[1])
        eos = list(p.eos_ids) if sampling.stop_at_eos else []
        config = GenerationConfig(
            max_new_tokens=sampling.max_new_tokens, do_sample=False, eos_token_id=eos or None, pad_token_id=p.pad_id, use_cache=True
        )
        extra = {"past_key_values": OneTypeCache(p.model.config, ids.shape[1] + sampling.max_new_tokens)} if self.static_cache else {}
        with generation_config(p.model, GenerationConfig()), p.autocast():
            out = p.model.generate(
                ids, attention_mask=mask.long(), generation_config=config, logits_processor=LogitsProcessorList([draw]), **extra
            )
        rows, scores = out[:, ids.shape[1] :].tolist(), draw.logprobs.tolist()
        samples = []
        for row, logprobs in zip(rows, scores, strict=True):
            length = next((i + 1 for i, token in enumerate(row) if token in eos), len(row))
            samples.append(Sample(row[:length], logprobs[:length], not eos or row[length - 1] in eos))
        return samples
