"""Adapters that took their start out of the base (PiSSA, OLoRA), published as plain LoRA on the base as it was.

Training computes with W - s B0 A0 + s B A. A loader has W, and knows nothing of B0 and A0: what is published is the update s (B A - B0 A0), which is
that of an adapter of twice the rank, [B, -B0] and [A; A0] (peft's `subtract_mutated_init` does the same with files).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

ADAPTER = "default"
A, B = (".lora_A.", ".lora_embedding_A."), (".lora_B.", ".lora_embedding_B.")  # of linear layers and of embeddings


def remember(model: Any) -> dict[str, Tensor]:
    """Copies of the A and B matrices of a model whose adapter has just been made, in main memory."""
    return {name: value.detach().to("cpu", copy=True) for name, value in model.state_dict().items() if any(part in name for part in A + B)}


def plain(state: dict[str, Tensor], initial: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with the adapter of twice the rank in the place of its own.

    A [r, in] and A0 become [2r, in]; B [out, r] and -B0 become [out, 2r].
    """
    out = dict(state)
    for name, start in initial.items():
        start = start.to(state[name])
        out[name] = torch.cat([state[name], start], 0) if any(part in name for part in A) else torch.cat([state[name], -start], 1)
    return out


@contextmanager
def as_plain(model: Any, initial: dict[str, Tensor] | None, state: dict[str, Tensor] | None) -> Iterator[dict[str, Tensor] | None]:
    """The state dict to save a trained model with, and within the block the config that belongs to it; both unchanged where `initial` is None.

    `state` is the model's where it holds parts only, on rank 0 (None elsewhere).
    """
    if not initial:
        yield state
        return
    trained = model.peft_config[ADAPTER]
    config = copy.copy(trained)
    # the same scale at twice the rank: alpha / r, or alpha / sqrt(r)
    config.r, config.lora_alpha, config.init_lora_weights = 2 * trained.r, trained.lora_alpha * (2**0.5 if trained.use_rslora else 2), True
    model.peft_config[ADAPTER] = config
    try:
        yield plain(model.state_dict() if state is None else state, initial)
    finally:
        model.peft_config[ADAPTER] = trained
