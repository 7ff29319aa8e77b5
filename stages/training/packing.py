"""Packing: several rows in one sequence, only where the model provably keeps them apart."""

from __future__ import annotations

from typing import Any

import torch

from configs.errors import UserError
from stages.zero import gather

TOLERANCE = 1e-3  # nats, relative to 1 + |log-prob|; a leak moves log-probs by far more


def pack_rows(rows: list[dict[str, Any]], max_length: int) -> list[dict[str, Any]]:
    """Rows as packed sequences with `seq_lengths`, best fit decreasing (TRL's `bfd`); no row is cut."""
    from datasets import Dataset
    from trl import pack_dataset

    return pack_dataset(Dataset.from_list(rows), max_length, "bfd").to_list()


@torch.no_grad()
def refuse_leaks(model: Any, rows: list[dict[str, Any]]) -> None:
    """Raise unless the log-probs of a row are the same alone and behind another row in one sequence.

    Without a mask, attention is told where a row begins by its position ids alone; some kernels and architectures read them
    so, others let the second row see the first.

    Raises:
        UserError: the second row sees the first.
    """
    if len(rows) < 2:
        return
    first, second = rows[0]["input_ids"], rows[1]["input_ids"]
    alone = _logprobs(model, second, list(range(len(second))))
    positions = list(range(len(first))) + list(range(len(second)))
    packed = _logprobs(model, first + second, positions)[len(first) :]
    gap = ((packed - alone).abs() / (1 + alone.abs())).max().item()
    if not gap <= TOLERANCE:
        kernel = getattr(model.config, "_attn_implementation", "?")
        raise UserError(
            f"packing: with {type(model).__name__} and attention kernel {kernel}, rows in one sequence see one another "
            f"(log-probs differ by {gap:.2g}); set packing: false, or another attn_implementation"
        )


def _logprobs(model: Any, ids: list[int], positions: list[int]) -> torch.Tensor:
    """Log-probs of every next token, [len(ids) - 1] nats."""
    device = next(model.parameters()).device
    batch = {"input_ids": torch.tensor([ids], device=device), "position_ids": torch.tensor([positions], device=device)}
    with gather.forward_possible(model):
        logits = model(**batch, use_cache=False).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(-1, batch["input_ids"][0, 1:, None]).squeeze(-1)
