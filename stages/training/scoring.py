"""What a trained reward model is worth: accuracy beside the best shortcut, calibration, and the scale of its scores."""

from __future__ import annotations

from typing import Any

import torch

from rewards.model import last_token_scores
from rewards.preference import best_shortcut, bradley_terry, shortcut_baselines
from stages.training.lockstep import per_row, right_padded


def scores(trainer: Any, rows: list[list[int]]) -> torch.Tensor:
    """Scores [N] (fp32, on the CPU) of rows of ids, read at the last token, in the order given, on every rank."""
    device, pad_id = trainer.accelerator.device, trainer.processing_class.pad_token_id

    def read(model: Any, indices: list[int]) -> torch.Tensor:
        mine = [rows[index] for index in indices]
        return last_token_scores(model, right_padded(mine, pad_id, device), right_padded([[1] * len(row) for row in mine], 0, device))

    return per_row(trainer, [len(row) for row in rows], read)


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
