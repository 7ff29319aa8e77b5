"""SFT by every technique on one tiny model, each once: what the tests of published techniques and of their children start from."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import torch

from stages import merging, models
from stages.registry import Checkpoint, Registry
from stages.training import publish
from tests.stage.runs import run, settings, workspace

LORA = {"method": "lora", "rank": 4, "alpha": 8}
TECHNIQUES: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "freeze": {"method": "full", "freeze": {"first": 1, "embeddings": True}},
    "thaw": {"method": "full", "freeze": {"first": 1, "unfreeze_every": 1}},
    "lora": LORA,
    "rslora": LORA | {"rslora": True},
    "dora": LORA | {"dora": True},
    "pissa": LORA | {"init": "pissa"},
    "pissa_fast": LORA | {"init": "pissa_fast", "rslora": True},
    "olora": LORA | {"init": "olora"},
    "dora_pissa": LORA | {"init": "pissa", "dora": True},
    "loraplus": LORA | {"learning_rate_ratio": 8.0},
    "ia3": {"method": "ia3"},
}
ADAPTERS = [name for name in TECHNIQUES if name not in ("full", "freeze", "thaw")]
TRAIN = {"max_steps": 2, "batch_size": 4, "micro_batch_size": 2, "learning_rate": 2e-2}


def dashed(name: str) -> str:
    """A technique's name as a checkpoint's."""
    return name.replace("_", "-")


class Trained:
    """A workspace with techniques trained in it when they are first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = workspace(folder, rows=30, hidden=16)
        self.registry = Registry(folder / "registry")
        self.logits: dict[str, list[torch.Tensor]] = {}  # of the model in the trainer's hands

    def checkpoint(self, name: str) -> Checkpoint:
        """sft/NAME, trained once."""
        if name not in self.logits:
            values = self.settings("sft", name, tune=TECHNIQUES[name])
            self.logits[name] = self.trained("sft", values | {"train": values["train"] | ({"learning_rate": 0.3} if name == "ia3" else {})})
        return self.registry.resolve(f"sft/{dashed(name)}")

    def trained(self, stage: str, values: dict[str, Any]) -> list[torch.Tensor]:
        """Run a stage; the logits (of a reward model, the scores) of the model in the trainer's hands."""
        original, found = publish.publish, []

        def seen(trainer: Any, cfg: Any, stage: str, tokens: Any, **rest: Any) -> str:
            trainer.model.eval()
            found.extend(merging.logits(trainer.model, tokens))
            return original(trainer, cfg, stage, tokens, **rest)

        with mock.patch.object(publish, "publish", seen):
            run(stage, values)
        return found

    def settings(self, stage: str, name: str, **changes: Any) -> dict[str, Any]:
        """A stage's config that publishes as STAGE/NAME."""
        return settings(self.folder, stage, TRAIN, name=dashed(name), output=str(self.folder / f"{stage}-{name}"), split={"validation": 0.1, "test": 0}, **changes)

    def origin(self, name: str) -> models.Origin:
        """The published technique, as a stage finds it."""
        checkpoint = self.checkpoint(name)
        return models.Origin(checkpoint.ref, checkpoint, self.registry)

    def merged(self, name: str) -> Path:
        """The technique merged and exported, once."""
        folder = self.folder / f"merged-{name}"
        if not folder.exists():
            merging.merge(self.registry, self.checkpoint(name), folder, "float32", lambda _: None)
        return folder
