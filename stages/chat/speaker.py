"""Policies that answer: loaded once, adapters of one base on one copy of it, and every answer handed out as it is written."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from configs.errors import UserError
from configs.references import is_reference
from stages import foreign, models
from stages.adapters.shelf import Shelf
from stages.chat.history import History, that_fit
from stages.evaluation.subject import Reader, device, load_reader
from stages.ppo.sampling import completion_seed, draw, uniforms_of

POLICIES = ("sft", "dpo", "ppo")


@dataclass
class Answer:
    """What a model wrote. finished: it ended the answer itself, with an EOS. left_out: turns that did not fit. seconds: of writing."""

    name: str
    text: str = ""
    tokens: int = 0
    prompt_tokens: int = 0
    finished: bool = False
    left_out: int = 0
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """For machines."""
        return {
            "name": self.name, "answer": self.text, "finished": self.finished, "tokens": self.tokens, "prompt_tokens": self.prompt_tokens,
            "turns_left_out": self.left_out, "seconds": round(self.seconds, 3),
        }  # fmt: skip


@dataclass(frozen=True)
class Manner:
    """How is answered. temperature: 0 takes the likeliest token each time. seed: of the whole conversation; each answer has its own draws from it."""

    temperature: float = 0.7
    max_new_tokens: int = 256
    seed: int = 0


class Speakers:
    """The models of a chat, by name; weights are loaded when one is first asked."""

    def __init__(self, names: Sequence[str], registry: Path, template: str = "auto", attn_implementation: str | None = None) -> None:
        """Raises UserError: a name that means nothing, a reward model, a checkpoint that is damaged."""
        self.origins = {name: find_policy(name, registry) for name in dict.fromkeys(names)}
        models.verify(*self.origins.values())
        self.held = [origin.lease("align chat talks to it") for origin in self.origins.values()]
        self.readers: dict[str, Reader] = {name: load_reader(name, origin, template) for name, origin in self.origins.items()}
        rows = {name: len(reader.tokens.tokenizer) for name, reader in self.readers.items()}
        self.shelf = Shelf(self.origins, rows, device=device(), attn_implementation=attn_implementation)

    def shared(self) -> list[list[str]]:
        """Names that lie on one copy of a base, in groups of two and more."""
        groups = {tuple(self.shelf.neighbours(name)) for name in self.origins}
        return sorted(list(group) for group in groups if len(group) > 1)

    def answer(self, name: str, history: History, question: str, manner: Manner, turn: int, show: Callable[[str], None] = lambda piece: None) -> Answer:
        """What `name` says. `show` is given each piece of text as soon as it is sure. Ctrl-C ends the answer, and what there is of it is returned.

        Raises UserError when the question does not fit.
        """
        reader = self.readers[name]
        ids, left_out = that_fit(history, question, reader.tokens.formatter.prompt_ids, reader.room, manner.max_new_tokens)
        given = Answer(name, prompt_tokens=len(ids), left_out=left_out)
        began, written = time.monotonic(), list[int]()
        try:
            model = self.shelf.weights(name)()
            for token in stream(model, ids, reader.tokens.eos_ids, manner, turn):
                written.append(token)
                given.finished = token in reader.tokens.eos_ids
                piece = settled(reader.tokens.formatter.completion_text(written), given.text, last=given.finished)
                given.text += piece
                show(piece)
        except KeyboardInterrupt:
            pass  # the reader has heard enough: what was written until now is the answer
        piece = settled(reader.tokens.formatter.completion_text(written), given.text, last=True)
        given.text += piece
        show(piece)
        given.tokens, given.seconds = len(written), time.monotonic() - began
        return given

    def close(self) -> None:
        """Give the leases back."""
        for lease in filter(None, self.held):
            lease.give_back()


def find_policy(name: str, registry: Path) -> models.Origin:
    """A policy by registry name, folder or hub name. Raises UserError: it means nothing, or it is a model that scores."""
    if is_reference(name) and name.startswith("reward/") and not Path(name).is_dir():
        raise UserError(f"{name} is a reward model: it scores answers and writes none. Talk to a policy ({', '.join(f'{stage}/NAME' for stage in POLICIES)}); it scores theirs with: align eval … --scorer {name}")
    origin = models.find(name, registry, stages=POLICIES)
    config = Path(origin.folder) / "config.json"
    architectures = foreign.read_json(config).get("architectures") if config.is_file() else None
    if architectures and all("SequenceClassification" in str(one) for one in architectures):
        raise UserError(f"{name} is a {architectures[0]}: it scores answers and writes none. Expected a causal language model")
    return origin


@torch.no_grad()
def stream(model: Any, prompt_ids: Sequence[int], eos_ids: Sequence[int], manner: Manner, turn: int) -> Iterator[int]:
    """Tokens of one answer, up to an EOS (given too) or max_new_tokens. The draws are those of `align eval` for (seed, turn)."""
    where = next(model.parameters()).device
    uniforms = uniforms_of([completion_seed(manner.seed, turn, 0)], manner.max_new_tokens).to(where)
    inputs = torch.tensor([list(prompt_ids)], device=where)
    attention, cache = torch.ones_like(inputs), DynamicCache(config=model.config)
    positions = attention.cumsum(dim=1) - 1
    for step in range(manner.max_new_tokens):
        logits = model(
            input_ids=inputs, attention_mask=attention, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1
        ).logits[:, -1].float()  # fmt: skip
        picked = draw(logits / manner.temperature, uniforms[:, step])[0] if manner.temperature else logits.argmax(dim=1)
        token = int(picked)
        yield token
        if token in eos_ids:
            return
        inputs, positions = picked.unsqueeze(1), positions[:, -1:] + 1
        attention = torch.cat([attention, attention.new_ones(1, 1)], dim=1)


def settled(text: str, shown: str, *, last: bool) -> str:
    """What of `text` can be shown after `shown`: not the beginning of a character whose other bytes are still to come, unless it is the last."""
    sure = text if last else text.rstrip("\ufffd")
    return sure[len(shown) :] if sure.startswith(shown) else ""


def facts_of(speakers: Mapping[str, models.Origin]) -> list[str]:
    """A line for each name: what it is."""
    return [f"{name}: {origin.checkpoint.ref if origin.checkpoint else origin.asked}{' (adapter)' if models.is_adapter(origin) else ''}" for name, origin in speakers.items()]
