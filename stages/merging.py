"""An adapter merged into its base, as a model of its own, and how far the two are apart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from configs.errors import UserError
from stages import models, soft
from stages.registry import Checkpoint, Registry
from stages.tokens import ModelTokens, load_tokens

PROMPTS = (
    "Hello!", "What is the capital of France?", "Write a short poem about the sea.", "def fibonacci(n):", "Explain why the sky is blue, in two sentences.",
    "Translate to German: good morning", "7 * 8 =", "I ordered a lamp and it arrived broken. What can I do?",
)  # fmt: skip
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def merge(registry: Registry, checkpoint: Checkpoint, folder: Path, dtype: str, say: Callable[[str], None]) -> float:
    """Write the merged model of an adapter checkpoint to `folder`; returns the largest difference of its logits (read back from the folder, in
    float32) from those of base and adapter kept apart, over PROMPTS. Of a reward model: of its scores.

    Raises UserError: an adapter whose base has changed or is gone, one that can't be merged.
    """
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}: expected one of {', '.join(DTYPES)}")
    origin = models.Origin(checkpoint.ref, checkpoint, registry)
    soft.refuse_merge(origin)
    models.verify(origin)
    tokens, scorer = load_tokens(origin), checkpoint.stage == "reward"
    model = (models.load_scorer if scorer else models.load_policy)(origin)
    # in float32, what the adapter leaves alone is written as the base has it: the same numbers, and imported again files that are there already
    models.save_model(model.to(DTYPES[dtype]), tokens.tokenizer, folder, eos_ids=tokens.eos_ids, like=origin if dtype == "float32" else None)
    del model  # one model at a time
    written = models.Origin(str(folder), None, None)
    merged = logits((models.load_scorer if scorer else models.load_policy)(written), tokens)
    apart = logits(models.load_apart(origin, scorer=scorer), tokens)
    difference = max(float((ours - theirs).abs().max()) for ours, theirs in zip(merged, apart, strict=True))
    largest = max(float(values.abs().max()) for values in apart)
    say(f"merged in {dtype}: over {len(PROMPTS)} prompts the largest difference of {'scores' if scorer else 'logits'} is {difference:.3g} (they reach {largest:.3g})")
    return difference


@torch.no_grad()
def logits(model: Any, tokens: ModelTokens) -> list[torch.Tensor]:
    """What a model says to each of PROMPTS: [T, V], or of a reward model [1, 1]."""
    ids = [torch.tensor([tokens.formatter.prompt_ids(text)]) for text in PROMPTS]
    return [model(input_ids=row, attention_mask=torch.ones_like(row)).logits[0].float() for row in ids]
