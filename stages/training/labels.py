"""Rows as TRL's SFTTrainer takes them."""

from __future__ import annotations

from typing import Any

IGNORED = -100  # the label of a token that the loss does not cover


def labelled(row: dict[str, Any]) -> dict[str, Any]:
    """TRL's columns: labels are the ids under the mask, -100 elsewhere."""
    return {
        "input_ids": row["input_ids"],
        "labels": [token if counts else IGNORED for token, counts in zip(row["input_ids"], row["completion_mask"], strict=True)],
    }
