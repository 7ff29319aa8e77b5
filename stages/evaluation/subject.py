"""A model under evaluation, and the completions it writes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from configs.errors import UserError
from configs.schema import EvalConfig
from stages import models, soft
from stages.adapters.shelf import Shelf
from stages.data import Prompt
from stages.ppo.sampling import completion_seed, sample
from stages.tokens import ModelTokens, load_tokens


@dataclass(frozen=True)
class Reader:
    """What is known of a model before its weights are loaded: its tokens, and how many of them it reads (None: no limit)."""

    label: str
    origin: models.Origin
    tokens: ModelTokens
    room: int | None

    @property
    def vocabulary(self) -> dict[str, int]:
        """Token text -> id."""
        return self.tokens.tokenizer.get_vocab()


@dataclass(frozen=True)
class Subject:
    """A loaded model and its reader."""

    reader: Reader
    weights: Callable[[], Any]

    @property
    def model(self) -> Any:
        """The model; of adapters that lie on one base, with this one's switched on, until another's is asked for."""
        return self.weights()

    @property
    def tokens(self) -> ModelTokens:
        """The model's own tokenizer and template."""
        return self.reader.tokens


@dataclass(frozen=True)
class Completions:
    """What a model wrote: N completions, samples_per_prompt of each prompt in turn."""

    groups: list[int]  # index of the prompt
    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]  # an EOS that ended it included
    finished: list[bool]
    texts: list[str]  # up to the EOS


def device() -> torch.device:
    """Where models are evaluated."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_reader(label: str, origin: models.Origin, template: str) -> Reader:
    """Tokens of a model. `template` is for models from outside; a published one carries its own. Raises UserError."""
    from transformers import AutoConfig

    under, taken = origin, 0
    while models.is_adapter(under):
        taken, under = taken + soft.virtual_tokens(under.folder), models.adapter_base(under)
    config = models.from_pretrained(AutoConfig, under.folder)
    room = getattr(config.get_text_config(), "max_position_embeddings", None)
    return Reader(label, origin, load_tokens(origin, "auto" if origin.checkpoint else template), room - taken if room else room)


def shelf_of(readers: Mapping[str, Reader], cfg: EvalConfig) -> Shelf:
    """Where the models of an evaluation are loaded: those that are adapters of one base, on one copy of it."""
    return Shelf(
        {label: reader.origin for label, reader in readers.items()}, {label: len(reader.tokens.tokenizer) for label, reader in readers.items()},
        device=device(), dtype=models.weights_dtype(cfg.precision, frozen=True), attn_implementation=cfg.attn_implementation,
    )  # fmt: skip


def that_fit(prompts: Sequence[Prompt], readers: Sequence[Reader], new_tokens: int) -> list[Prompt]:
    """The prompts that leave every model room for a completion, so that all are measured on the same ones.

    Raises UserError when none does.
    """
    kept = [row for row in prompts if all(_fits(row, reader, new_tokens) for reader in readers)]
    if not kept:
        rooms = ", ".join(f"{reader.label} reads {reader.room} tokens" for reader in readers if reader.room)
        raise UserError(f"none of {len(prompts)} prompts leaves room for sampling.max_new_tokens {new_tokens}: {rooms}; lower it or shorten the prompts")
    return kept


def _fits(row: Prompt, reader: Reader, new_tokens: int) -> bool:
    return reader.room is None or len(reader.tokens.formatter.prompt_ids(row.prompt)) + new_tokens <= reader.room


def complete(subject: Subject, prompts: Sequence[Prompt], cfg: EvalConfig) -> Completions:
    """Sample cfg.samples_per_prompt completions of each prompt. A completion's seed follows from cfg.seed, its prompt and its number,
    so every model is given the same draws.
    """
    encoded = [subject.tokens.formatter.prompt_ids(row.prompt) for row in prompts]
    places = [(i, k) for i in range(len(prompts)) for k in range(cfg.samples_per_prompt)]
    prompt_ids = [encoded[i] for i, _ in places]
    samples = sample(
        subject.model, prompt_ids, sampling=cfg.sampling, eos_ids=subject.tokens.eos_ids, pad_id=subject.tokens.pad_id,
        seeds=[completion_seed(cfg.seed, i, k) for i, k in places],
    )  # fmt: skip
    completion_ids = [s.completion_ids for s in samples]
    texts = [subject.tokens.formatter.completion_text(ids) for ids in completion_ids]
    return Completions([i for i, _ in places], prompt_ids, completion_ids, [s.finished for s in samples], texts)
