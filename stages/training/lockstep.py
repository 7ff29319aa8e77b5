"""One number per row of a set, by forward passes that every process makes in step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from stages.training import watchdog


@torch.no_grad()
def per_row(trainer: Any, lengths: Sequence[int], forward: Callable[[Any, list[int]], torch.Tensor]) -> torch.Tensor:
    """[N] (fp32, on the CPU), in the order given, on every rank. `forward(model, indices)` gives one number for each row of a batch.

    Rows are taken by length, so that a batch holds little padding; every rank makes the same number of forward passes, because ZeRO-3 gathers
    weights in each.
    """
    accelerator, size = trainer.accelerator, trainer.args.per_device_eval_batch_size
    model = trainer.model_wrapped if trainer.is_deepspeed_enabled else trainer.model
    was_training = model.training
    model.eval()
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    out = torch.empty(len(lengths))
    stride = size * accelerator.num_processes
    for start in range(0, len(lengths), stride):
        places = [min(start + offset, len(lengths) - 1) for offset in range(stride)]  # the last row fills up
        mine = [order[place] for place in places[accelerator.process_index * size :][:size]]
        watchdog.beat()
        with accelerator.autocast():
            found = accelerator.gather(forward(model, mine)).float().cpu()
        out[[order[place] for place in places]] = found
    model.train(was_training)
    return out


def right_padded(rows: Sequence[Sequence[int]], fill: int, device: torch.device) -> torch.Tensor:
    """Rows of ids as [B, longest], `fill` after each."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows], device=device)
