"""The techniques that are compared: their `tune:` section, the learning rate that suits them, and when to use them."""

from __future__ import annotations

from typing import Any, NamedTuple

RANK = {"rank": 16, "alpha": 32}


class Entry(NamedTuple):
    """One row of the table."""

    tune: dict[str, Any]
    rate: float  # learning rate, as a multiple of that of full training
    when: str


TECHNIQUES = {
    "full": Entry({"method": "full"}, 1, "memory and data allow it"),
    "freeze": Entry({"method": "full", "freeze": {"keep_last": 1, "embeddings": True}}, 1, "little data, less forgetting, half the memory"),
    "lora": Entry({"method": "lora", **RANK}, 10, "the default on one GPU"),
    "rslora": Entry({"method": "lora", **RANK, "rslora": True}, 10, "ranks of 64 and more"),
    "dora": Entry({"method": "lora", **RANK, "dora": True}, 10, "low ranks that fall short of full"),
    "pissa": Entry({"method": "lora", **RANK, "init": "pissa"}, 2, "few steps; closer to full"),
    "olora": Entry({"method": "lora", **RANK, "init": "olora"}, 2, "as pissa, quicker to start"),
    "lora+": Entry({"method": "lora", **RANK, "learning_rate_ratio": 16}, 5, "LoRA that learns slowly"),
    "qlora": Entry({"method": "qlora", **RANK}, 10, "the base does not fit otherwise"),
    "ia3": Entry({"method": "ia3"}, 100, "tens of rows, very many adapters"),
    "prompt_tuning": Entry({"method": "prompt_tuning"}, 300, "many tasks, one large frozen model"),
    "prefix_tuning": Entry({"method": "prefix_tuning"}, 30, "as prompt_tuning, smaller models"),
    "p_tuning": Entry({"method": "p_tuning"}, 30, "as prompt_tuning, easier to train"),
}
"""By the name that --techniques takes."""
