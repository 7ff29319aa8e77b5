"""What a run forgets of what its starting model could do: perplexity of plain text, and the answers that the model gave to general prompts.

Whether an answer has changed is read off the answer itself: greedy decoding still gives it where each of its tokens, after those before it, has the
highest probability. So only the starting model generates; every later look is a forward pass, exact on any number of processes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from configs.schema import SFTStage
from configs.schema.common import Source
from stages import data
from stages.compat import token_statistics
from stages.evaluation import likelihood
from stages.nodes.once import once_per_node
from stages.tokens import ModelTokens
from stages.training import health, measures, watchdog
from stages.training.evaluation import evaluate_exactly
from stages.training.labels import IGNORED
from stages.training.ranks import from_rank_0

PROMPTS, ANSWER = 32, 32  # prompts that are answered, and tokens of an answer

Ids = list[list[int]]


class Forgetting:
    """Measures it on a trainer's model, on every rank alike. `state` is what a save has to hold: what the starting model said."""

    def __init__(self, trainer: Any, cfg: SFTStage, tokens: ModelTokens, limit: int) -> None:
        self.trainer, self.tokens = trainer, tokens
        self.text, self.prompts, self.asked = once_per_node("reading health.plain_text and health.general_prompts", lambda: read(cfg, tokens, limit))
        self.answers: Ids | None = None
        self.logprob = 0.0  # of a token of the answers, under the model that gave them

    def start(self) -> dict[str, float]:
        """Take the model as it is for the starting model, and measure it."""
        self.answers = answers_of(self.trainer, self.prompts, self.tokens)
        return {health.START: 1.0, **self.look(start=True)}

    def look(self, *, start: bool = False) -> dict[str, float]:
        """Perplexity per token; nats per token that the old answers have lost; share of them that are no longer the model's choice. A collective."""
        found: dict[str, float] = {}
        with watchdog.during("eval"):
            if self.text:
                loss = evaluate_exactly(self.trainer, self.text, measures.tokens)["loss"]
                found[health.PERPLEXITY] = math.exp(min(loss, 700.0))
            if self.prompts and self.answers is not None:
                rows = [scored_row(prompt, answer) for prompt, answer in zip(self.prompts, self.answers, strict=True)]
                seen = evaluate_exactly(self.trainer, rows, kept_answers, self._padded)
                self.logprob = seen["logprob"] if start else self.logprob
                found |= {health.DROP: self.logprob - seen["logprob"], health.CHANGED: seen["changed"]}
        return found

    def _padded(self, rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        """Rows as [B, T], padded on the right; packed runs have no such collator of their own."""
        width = max(len(row["input_ids"]) for row in rows)

        def pad(key: str, value: int) -> torch.Tensor:
            return torch.tensor([row[key] + [value] * (width - len(row[key])) for row in rows])

        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        mask = (torch.arange(width) < lengths.unsqueeze(1)).long()
        return {"input_ids": pad("input_ids", self.tokens.pad_id), "attention_mask": mask, "labels": pad("labels", IGNORED)}

    def state(self) -> dict[str, Any]:
        """What the starting model said, and to what."""
        return {"asked": self.asked, "answers": self.answers, "logprob": self.logprob}

    def load(self, saved: dict[str, Any]) -> bool:
        """Go on from what `state` gave; whether that is about the same text and prompts."""
        if saved.get("asked") != self.asked:
            return False
        self.answers, self.logprob = saved["answers"], saved["logprob"]
        return True


def read(cfg: SFTStage, tokens: ModelTokens, limit: int) -> tuple[list[dict[str, list[int]]], Ids, str]:
    """(Labelled windows of the plain text, ids of the general prompts, a fingerprint of both); empty where they are not asked for.

    Raises:
        UserError: a file that can't be read or holds too little.
    """
    rows: list[dict[str, list[int]]] = []
    prompts: list[data.Prompt] = []
    if cfg.health.plain_text is not None:
        contexts, scored = likelihood.text_windows(tokens.tokenizer, cfg.health.plain_text, min(likelihood.WINDOW, limit))
        rows = [scored_row(context, rest) for context, rest in zip(contexts, scored, strict=True)]
    if cfg.health.general_prompts is not None:
        prompts = data.read_prompts([Source(path=str(cfg.health.general_prompts), limit=PROMPTS)]).rows
    encoded, _ = data.encode_prompts(tokens.formatter, prompts, limit, min(ANSWER, limit - 1), "drop", may_be_empty=True)
    texts = data.fingerprint(prompts) + fingerprint_of(rows)
    return rows, [row["prompt_ids"] for row in encoded], texts


def fingerprint_of(rows: Sequence[dict[str, list[int]]]) -> str:
    """What identifies token rows."""
    from blake3 import blake3

    return blake3(repr([row["input_ids"] for row in rows]).encode()).hexdigest()


def scored_row(context: list[int], scored: list[int]) -> dict[str, list[int]]:
    """TRL's columns for tokens of which only the last ones count."""
    return {"input_ids": context + scored, "labels": [IGNORED] * len(context) + scored}


def kept_answers(trainer: Any, model: Any, inputs: dict[str, Any]) -> measures.Sums:
    """Log-prob (nats) of a token of the old answers, and the share of answers of which some token is no longer the likeliest."""
    seen = token_statistics(model, inputs, inputs["labels"])
    changed = (seen.counted & ~seen.correct.bool()).any(dim=1)
    rows = torch.tensor(float(len(changed)), device=changed.device)
    return {"logprob": (seen.logprobs.double().sum(), seen.counted.sum()), "changed": (changed.sum(), rows)}


@torch.no_grad()
def answers_of(trainer: Any, prompts: Ids, tokens: ModelTokens) -> Ids:
    """The model's greedy answers of at most ANSWER tokens, with the EOS where one ended it: the same on every rank.

    Every rank decodes all of them: these are few tokens, and under ZeRO-3 each forward pass is a collective.
    """
    sharded = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
    model, size = trainer.model_wrapped if sharded else trainer.model, trainer.args.per_device_eval_batch_size
    was_training = model.training
    model.eval()
    answers: Ids = []
    for start in range(0, len(prompts), size):
        part = prompts[start : start + size]
        written: Ids = [[] for _ in part]
        for _ in range(ANSWER):
            chosen = next_tokens(trainer, model, [p + w for p, w in zip(part, written, strict=True)], tokens.pad_id)
            for answer, token in zip(written, chosen, strict=True):
                if not answer or answer[-1] not in tokens.eos_ids:
                    answer.append(token)
        answers += written
    model.train(was_training)
    return from_rank_0("answers of the starting model", lambda: answers)


def next_tokens(trainer: Any, model: Any, rows: Ids, pad_id: int) -> list[int]:
    """The likeliest token after each row. Rows are padded on the right, where a causal model does not look."""
    width = max(map(len, rows))
    device = trainer.accelerator.device
    ids = torch.tensor([row + [pad_id] * (width - len(row)) for row in rows], device=device)
    last = torch.tensor([len(row) - 1 - width for row in rows])  # from the end: what a soft prompt puts before the row does not count
    positions, where = torch.unique(last, return_inverse=True)
    with trainer.accelerator.autocast():
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), logits_to_keep=positions.to(device), use_cache=False).logits
    return logits[torch.arange(len(rows)), where].argmax(dim=-1).tolist()
