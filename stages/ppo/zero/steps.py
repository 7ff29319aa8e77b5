"""Sampling from a policy that stays split (ZeRO-3): every forward pass gathers layer by layer, so all processes make it together.

Completions have different lengths. A process that has all of its own goes on with passes that nobody reads until every process is done.
"""

from __future__ import annotations

from typing import Any

import torch


class Stepped:
    """The policy as a sampler calls it, each call in step with one of every other process."""

    def __init__(self, engine: Any, policy: Any) -> None:
        self.engine, self.policy = engine, policy
        self.idle_steps = 0  # passes made for the others since the start

    def __getattr__(self, name: str) -> Any:
        """Whatever else a sampler asks of a model is the policy's."""
        return getattr(self.policy, name)

    def __call__(self, **inputs: Any) -> Any:
        """What the policy returns."""
        self._anyone(True)
        return self.engine("call", inputs=inputs)

    @torch.no_grad()
    def wait(self) -> None:
        """Go along with the other processes until all of them have come here."""
        device = next(self.parameters()).device
        one = torch.zeros((1, 1), dtype=torch.long, device=device)
        while self._anyone(False):
            self.idle_steps += 1
            self.engine("call", inputs={"input_ids": one, "attention_mask": one + 1, "position_ids": one, "use_cache": False, "logits_to_keep": 1})

    def _anyone(self, busy: bool) -> bool:
        """Whether any process has a pass to make. A collective."""
        count = torch.tensor([int(busy)], device=next(self.parameters()).device)
        torch.distributed.all_reduce(count)
        return bool(count.item())
