"""The record that passes between the steps of an iteration, and how micro-batches are cut from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from stages.ppo.sampling import left_pad


@dataclass(frozen=True)
class Tokens:
    """Prompts and completions as a model reads them."""

    prompt_ids: Tensor  # [B, P] left-padded
    prompt_mask: Tensor  # [B, P] bool
    completion_ids: Tensor  # [B, T] right-padded
    mask: Tensor  # [B, T] bool, True on sampled tokens

    @property
    def input_ids(self) -> Tensor:
        """Prompt and completion, [B, P + T]."""
        return torch.cat([self.prompt_ids, self.completion_ids], dim=1)

    @property
    def attention_mask(self) -> Tensor:
        """[B, P + T], 1 on real tokens."""
        return torch.cat([self.prompt_mask, self.mask], dim=1).long()

    def longest(self) -> int:
        """Real tokens of the longest row, at least 1."""
        return int(self.attention_mask.sum(dim=1).max().clamp(min=1))

    def flush_left(self, width: int | None = None) -> Tensor:
        """Prompt and completion of each row from column 0 on, padded on the right to `width`, or to the longest: [B, L]."""
        pads = (~self.prompt_mask).sum(dim=1, keepdim=True)
        ids = self.input_ids
        columns = pads + torch.arange(self.longest() if width is None else width, device=ids.device)
        return ids.gather(1, columns.clamp(max=ids.shape[1] - 1))

    def trimmed(self) -> Tokens:
        """Without the columns that hold only padding; one completion column stays."""
        prompts = int(self.prompt_mask.sum(dim=1).max())
        completions = max(int(self.mask.sum(dim=1).max()), 1)
        width = self.prompt_ids.shape[1]
        return replace(
            self,
            prompt_ids=self.prompt_ids[:, width - prompts :],
            prompt_mask=self.prompt_mask[:, width - prompts :],
            completion_ids=self.completion_ids[:, :completions],
            mask=self.mask[:, :completions],
        )


def padded(prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> Tokens:
    """Left-padded prompts and right-padded completions."""
    prompt_ids, prompt_mask = left_pad(prompts, pad_id, device)
    reversed_ids, reversed_mask = left_pad([ids[::-1] for ids in completions], pad_id, device)
    return Tokens(prompt_ids, prompt_mask, reversed_ids.flip(1), reversed_mask.flip(1))


@dataclass(frozen=True)
class Rollout:
    """One iteration's samples over all processes, identical on every process."""

    tokens: Tokens
    finished: Tensor  # [B] bool, an EOS ended the completion
    old_logprobs: Tensor  # [B, T] nats, in the arithmetic of the update
    ref_logprobs: Tensor  # [B, T] nats
    values: Tensor  # [B, T + 1]; [:, t] is the expected return before token t
    scores: Tensor  # [B] raw
    entropy: Tensor  # [B, T] nats
    parts: Tensor  # [B, S] raw values of each scorer, unweighted
    parts_mask: Tensor  # [B, S] bool, True where a scorer applies
    sampler_logprobs: Tensor  # [B, T] nats, as the engine that sampled gives them

    def __len__(self) -> int:
        return self.scores.shape[0]


@dataclass(frozen=True)
class Experience:
    """What the update reads, cut from a rollout: everything but the model's own outputs of now."""

    tokens: Tokens
    old_logprobs: Tensor  # [B, T]
    advantages: Tensor  # [B, T]
    old_values: Tensor  # [B, T + 1]
    returns: Tensor  # [B, T + 1]
    value_mask: Tensor  # [B, T + 1] bool
    importance: Tensor | None = None  # [B, T] weights of the policy loss, where an engine sampled that is not the policy

    def select(self, rows: Tensor) -> Experience:
        """The given rows, trimmed to the columns they use."""
        tokens = Tokens(**{f.name: getattr(self.tokens, f.name)[rows] for f in fields(Tokens)}).trimmed()
        width = tokens.mask.shape[1]
        return Experience(
            tokens,
            self.old_logprobs[rows, :width],
            self.advantages[rows, :width],
            self.old_values[rows, : width + 1],
            self.returns[rows, : width + 1],
            self.value_mask[rows, : width + 1],
            self.importance[rows, :width] if self.importance is not None else None,
        )

    def lengths(self) -> Tensor:
        """Real tokens of each row, prompt and completion, [B]."""
        return self.tokens.attention_mask.sum(dim=1)


def cut(tokens: Tokens, rows: Tensor) -> Tokens:
    """The given rows of a token record, trimmed."""
    return Tokens(**{f.name: getattr(tokens, f.name)[rows] for f in fields(Tokens)}).trimmed()
