"""What a trained reward model is worth: accuracy beside the best shortcut, calibration, and the scale of its scores."""

from __future__ import annotations

from typing import Any

import torch

from rewards.model import last_token_scores
from rewards.preference import best_shortcut, bradley_terry, shortcut_baselines
from stages.training import watchdog


@torch.no_grad()
def scores(trainer: Any, rows: list[list[int]]) -> torch.Tensor:
    """Scores [N] (fp32, on the CPU) of rows of ids, read at the last token, in the order given, on every rank.

    Rows are taken by length, so that a batch holds little padding; every rank makes the same number of forward passes.
    """
    accelerator, size, pad_id = trainer.accelerator, trainer.args.per_device_eval_batch_size, trainer.processing_class.pad_token_id
    model = trainer.model_wrapped if trainer.is_deepspeed_enabled else trainer.model
    model.eval()
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    out = torch.empty(len(rows))
    stride = size * accelerator.num_processes
    for start in range(0, len(rows), stride):
        places = [min(start + offset, len(rows) - 1) for offset in range(stride)]  # the last row fills up
        mine = [rows[order[place]] for place in places[accelerator.process_index * size :][:size]]
        width = max(map(len, mine))
        watchdog.beat()
        ids = torch.tensor([row + [pad_id] * (width - len(row)) for row in mine], device=accelerator.device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in mine], device=accelerator.device)
        with accelerator.autocast():
            found = accelerator.gather(last_token_scores(model, ids, mask)).float().cpu()
        out[[order[place] for place in places]] = found
    return out


def quality(trainer: Any, train: list[dict[str, Any]], pairs: list[dict[str, Any]]) -> dict[str, Any]:
    """Accuracy (each pair once), calibration error and loss on held-out `pairs`, beside the best shortcut on the same ones.

    `train` and `pairs` are encoded, those too long left out. Empty where there is no held-out pair.
    """
    if not pairs:
        return {}
    both = [pair["prompt_ids"] + pair[side] for side in ("chosen_ids", "rejected_ids") for pair in pairs]
    chosen, rejected = scores(trainer, both).double().chunk(2)
    found = bradley_terry((chosen - rejected).numpy())
    name, shortcut = best_shortcut(shortcut_baselines([pair["row"] for pair in train], [pair["row"] for pair in pairs]))
    return {
        "accuracy": found.accuracy, "best_shortcut": shortcut, "shortcut_name": name, "ece": found.ece, "loss": found.loss,
        "margin": found.margin, "pairs": found.n,
    }  # fmt: skip


def scale(trainer: Any, rows: list[list[int]]) -> dict[str, Any]:
    """Mean and standard deviation of the scores on demonstrations, and how many they were: what PPO centres by."""
    found = scores(trainer, rows).double()
    return {"mean": found.mean().item(), "std": found.std(unbiased=False).item(), "n": len(rows)}
