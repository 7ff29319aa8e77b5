"""Frozen models that stay in main memory and are on the accelerator only while they are used.

A rollout uses the reference and each reward model once, so each of them travels once per iteration, and once per evaluation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rewards.model import RewardModelScorer
from stages.ppo.modules import Reference


@contextmanager
def brought(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Within the block the model is on `device`, after it in main memory."""
    model.to(device)
    try:
        yield
    finally:
        model.to("cpu")


class OffloadedReference(Reference):
    """A reference of its own that is on `device` within `at_hand` only."""

    def __init__(self, model: Any, *, temperature: float, device: torch.device) -> None:
        super().__init__(model, temperature=temperature)
        self.device = device

    def at_hand(self) -> AbstractContextManager[None]:
        """The context in which `logprobs` runs."""
        return brought(self.model, self.device)


class OffloadedScorer(RewardModelScorer):
    """A reward model of its own that is on `device` while it scores."""

    def __init__(self, *args: Any, device: torch.device, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.device = device

    def score_ids(
        self, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]], finished: Sequence[bool] | None = None
    ) -> Tensor:
        """Scores [B] at the last token of each completion, in main memory."""
        with brought(self.model, self.device):
            return super().score_ids(prompt_ids, completion_ids, finished).cpu()
