"""The demo's own base model: a small Llama trained on generated text of the support world, in about a minute on a CPU.

The text is what a base model has read: dialogues in which agents answer in all manner of ways, tickets with notes, and lists that are
copied out. It therefore knows the language and can copy order numbers and items, but it has no idea of a good answer.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from launch.demo import wording, world

ANSWER_QUALITY, ANSWER_NAMING = 0.25, 0.45  # shares of right parts in the agents' answers that the base model reads
COPIES, TICKETS = 0.3, 0.25  # shares of the texts; the rest are dialogues
COPIES_ONLY = 0.25  # share of the steps, the first ones, of exercises only: copying is learnt in a minute


def draw_document(rng: random.Random) -> tuple[str, str]:
    """A text in two parts, of which the model learns to predict the second: an exercise in copying, a ticket or a dialogue."""
    kind = rng.random()
    if kind < COPIES:
        return draw_copy(rng)
    case = world.draw_case(rng)
    if kind < COPIES + TICKETS:
        note = world.answer(case, world.Way("right", "right", "right", "plain", False), rng)
        return f"Ticket: {case.message}\nNote:", f" {note}"
    reply = world.answer(case, world.draw_way(rng, ANSWER_QUALITY, ANSWER_NAMING), rng)
    if rng.random() < 0.25:  # a base model does not know when to stop
        reply += " " + rng.choice(rng.choice((wording.RAMBLING, wording.NO_REMEDY, wording.NEITHER)))
    return "User:", f" {case.message}\nAssistant: {reply}"


def draw_copy(rng: random.Random) -> tuple[str, str]:
    """A list and its copy, or a message and the form that was filled in from it: all that is learnt stood in the text before."""
    if rng.random() < 0.5:
        case = world.draw_case(rng)
        remedy = rng.choice(wording.PROBLEMS[case.problem].remedies)
        return f"Ticket: {case.message}\nForm:", f" the {case.item}, order {case.order}. {remedy}"
    entries = []
    for _ in range(rng.randint(3, 8)):
        number, item = world.draw_order(rng), rng.choice(wording.ITEMS)
        entries.append(rng.choice((number, item, f"{number} {item}")))
    listed = ", ".join(entries)
    return f"List: {listed}.\nAgain:", f" {listed}."


def build_tokenizer(texts: Iterator[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with letters and digits in tokens of their own; pad, BOS and EOS are three different tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<pad>", "<bos>", "<eos>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", model_max_length=256
    )


def train_base(
    output: str, seed: int = 0, steps: int = 700, batch_size: int = 32, learning_rate: float = 3e-3, hidden_size: int = 96,
    layers: int = 3, heads: int = 4, vocabulary: int = 640,
) -> None:  # fmt: skip
    """Train the base model and write it, a plain Hugging Face folder, to `output`.

    The folder appears by a rename when it is complete: a killed run leaves none, or the one that was there.
    """
    arguments: dict[str, Any] = {key: value for key, value in locals().items() if key != "output"}
    folder = Path(output)
    torch.manual_seed(seed)
    rng = random.Random(f"base {seed}")
    tokenizer = build_tokenizer(("".join(draw_document(rng)) for _ in range(3000)), vocabulary)
    model = LlamaForCausalLM(_architecture(tokenizer, hidden_size, layers, heads))
    _look_alike(model)
    _train(model, tokenizer, rng, steps, batch_size, learning_rate)
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}")
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    facts = {"arguments": arguments, "parameters": model.num_parameters()}
    (unfinished / "base.json").write_text(json.dumps(facts, indent=2) + "\n")
    _put_in_place(unfinished, folder)


def _architecture(tokenizer: PreTrainedTokenizerFast, hidden_size: int, layers: int, heads: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=hidden_size, intermediate_size=2 * hidden_size, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=256, tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        initializer_range=hidden_size**-0.5,  # at the customary 0.02 so narrow a model has not learnt to copy after 500 steps
    )  # fmt: skip


def _look_alike(model: LlamaForCausalLM) -> None:
    """Start with keys equal to queries: a token then attends to its like, which is half of copying and of comparing.

    After Trockman and Kolter 2023, arXiv:2305.09828. From unrelated keys and queries so small a model needs far more text to find it.
    """
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.k_proj.weight.copy_(layer.self_attn.q_proj.weight)


class Batch(NamedTuple):
    """Texts of one step. Masks: True counts."""

    ids: Tensor  # [B, L]
    real: Tensor  # [B, L], not padding
    learnt: Tensor  # [B, L], tokens in the loss


def _train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    rng: random.Random,
    steps: int,
    batch_size: int,
    learning_rate: float,
) -> None:
    """AdamW with a short warm-up and a cosine decay, each text once."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    warm_up = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 0.05, total_iters=warm_up),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps - warm_up), eta_min=learning_rate / 20),
        ],
        [warm_up],
    )
    started = time.monotonic()
    model.train()
    for step, batch in enumerate(_batches(tokenizer, rng, steps, batch_size), start=1):
        logits = model(input_ids=batch.ids[:, :-1], attention_mask=batch.real[:, :-1].long(), use_cache=False).logits
        learnt = batch.learnt[:, 1:]
        loss = cross_entropy(logits[learnt], batch.ids[:, 1:][learnt])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps:
            left = (time.monotonic() - started) / step * (steps - step)
            print(f"base model: step {step}/{steps}, loss {loss.item():.3f}, {left:.0f} s left", flush=True)


def _batches(tokenizer: PreTrainedTokenizerFast, rng: random.Random, steps: int, batch_size: int) -> Iterator[Batch]:
    """Batches of new texts, right-padded."""
    for step in range(steps):
        draw = draw_copy if step < COPIES_ONLY * steps else draw_document
        texts = [draw(rng) for _ in range(batch_size)]
        before, after = (tokenizer(list(part))["input_ids"] for part in zip(*texts, strict=True))
        rows = [[*first, *second, tokenizer.eos_token_id] for first, second in zip(before, after, strict=True)]
        width = max(map(len, rows))
        ids = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows])
        places = torch.arange(width)
        real = places < torch.tensor([[len(row)] for row in rows])
        yield Batch(ids, real, real & (places >= torch.tensor([[len(first)] for first in before])))


def _put_in_place(unfinished: Path, folder: Path) -> None:
    """Move a complete folder to its place. Between the two renames there may be none, never a partial one."""
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    if folder.exists():
        folder.rename(old)
    unfinished.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
