"""What a run keeps beside it: resumable saves and its best policies. Every process calls these, and learns what came of it.

This is the store of a run whose processes each hold everything: rank 0 writes and reads. `ShardedStore` (stages/ppo/zero/saves.py) has the
same methods where ZeRO splits the optimizer, and the weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stages.ppo import state
from stages.ppo.modules import PolicyAndValue
from stages.ppo.state import Position
from stages.training.ranks import from_rank_0


class Store:
    """Saves in `folder`, of the trained module and its optimizer."""

    def __init__(self, folder: Path, module: PolicyAndValue, optimizer: Any) -> None:
        self.folder, self.module, self.optimizer = folder, module, optimizer

    def save(self, position: Position, extra: Mapping[str, Mapping[str, Tensor]]) -> bool:
        """Write a resumable save, with `extra` tensors by name of a file of their own; whether that worked."""
        what = f"the save after iteration {position.iteration}"
        return from_rank_0(what, lambda: state.attempt(what, lambda: state.save(self.folder, self.module, self.optimizer, position, extra=extra), self.folder))

    def save_best(self, iteration: int, bests: Sequence[int]) -> None:
        """Keep the policy as it is, the last of `bests`, and forget those that nothing may publish any more."""

        def keep() -> None:
            state.save_best(self.folder, self.module, iteration)
            state.forget_bests(self.folder, bests)

        from_rank_0(f"best-{iteration}", lambda: state.attempt(f"best-{iteration}", keep, self.folder))

    def load_best(self, iteration: int) -> str | None:
        """Put a kept policy into the module that is published; what is wrong with it where that can't be done."""
        return from_rank_0("loading the best policy", lambda: state.load_best(self.folder, self.module, iteration))

    def is_finite(self) -> bool:
        """Whether every number of the policy is finite."""
        return all(bool(torch.isfinite(p).all()) for p in state.policy_tensors(self.module).values())
