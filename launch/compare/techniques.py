"""The techniques that are compared: what they add to a config, the learning rate that suits them, and when to use them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

RANK = {"rank": 16, "alpha": 32}
FULL = {"method": "full"}
LORA = {"method": "lora", **RANK}
LAST = {"keep_last": 1, "embeddings": True}
THAWS = 4  # in the steps of a comparison gradual unfreezing thaws so many times, less one


class Entry(NamedTuple):
    """One row of the table."""

    tune: dict[str, Any]
    rate: float  # learning rate, as a multiple of that of full training
    when: str
    train: Mapping[str, Any] = MappingProxyType({})  # what is not which weights are trained, but how

    def sections(self, steps: int) -> dict[str, dict[str, Any]]:
        """Its part of a config that trains for `steps` optimizer steps."""
        freeze = self.tune.get("freeze")
        thawing = {"freeze": freeze | {"unfreeze_every": max(1, steps // THAWS)}} if freeze and "unfreeze_every" in freeze else {}
        return {"tune": self.tune | thawing, "train": dict(self.train)}


TECHNIQUES = {
    "full": Entry(FULL, 1, "memory and data allow it"),
    "freeze": Entry({**FULL, "freeze": LAST}, 1, "little data, less forgetting"),
    "unfreeze": Entry({**FULL, "freeze": {**LAST, "unfreeze_every": 1}}, 1, "as freeze; its memory grows"),
    "lora": Entry(LORA, 10, "the default on one GPU"),
    "rslora": Entry({**LORA, "rslora": True}, 10, "ranks of 64 and more"),
    "dora": Entry({**LORA, "dora": True}, 10, "low ranks that fall short of full"),
    "gaussian": Entry({**LORA, "init": "gaussian"}, 10, "as lora, A drawn as in its paper"),
    "pissa": Entry({**LORA, "init": "pissa"}, 2, "few steps; closer to full"),
    "pissa_fast": Entry({**LORA, "init": "pissa_fast"}, 2, "as pissa, for large layers"),
    "olora": Entry({**LORA, "init": "olora"}, 2, "as pissa, quicker to start"),
    "lora+": Entry({**LORA, "learning_rate_ratio": 16}, 2, "LoRA that learns slowly"),
    "qlora": Entry({"method": "qlora", **RANK}, 10, "the base does not fit otherwise"),
    "ia3": Entry({"method": "ia3"}, 100, "tens of rows, very many adapters"),
    "prompt_tuning": Entry({"method": "prompt_tuning"}, 300, "many tasks, one large frozen model"),
    "prefix_tuning": Entry({"method": "prefix_tuning"}, 30, "as prompt_tuning, smaller models"),
    "p_tuning": Entry({"method": "p_tuning"}, 30, "as prompt_tuning, easier to train"),
    "neftune": Entry(FULL, 1, "with any: small sets, open answers", {"neftune_alpha": 5.0}),
    "dropout": Entry(FULL, 1, "with any: more epochs of small data", {"dropout": 0.1}),
    "weight_decay": Entry(FULL, 1, "with any: long runs", {"weight_decay": 0.1}),
    "label_smoothing": Entry(FULL, 1, "with any: overconfidence", {"label_smoothing": 0.1}),
}
"""By the name that --techniques takes."""
