"""What a run keeps beside it: resumable saves and its best policies. Every process calls these, and learns what came of it.

This is the store of a run whose processes each hold everything: rank 0 writes and reads. `ShardedStore` (stages/ppo/zero/saves.py) has the
same methods where ZeRO splits the optimizer, and the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stages.ppo import state
from stages.ppo.modules import PolicyAndValue
from stages.ppo.state import Position
from stages.training import saves
from stages.training.ranks import from_rank_0, rank
from stages.training.saves import Failure, attempted


class Store:
    """Saves in `folder`, of the trained module and its optimizer. `depends_on` is the run's `identity`, which every save holds."""

    def __init__(self, folder: Path, module: PolicyAndValue, optimizer: Any, depends_on: Mapping[str, Any], resumed_from: Path | None = None) -> None:
        self.folder, self.module, self.optimizer, self.depends_on = folder, module, optimizer, depends_on
        self.saved = resumed_from.name if resumed_from else None  # the newest save
        self.stepped = False  # since then
        optimizer.register_step_post_hook(lambda *_: setattr(self, "stepped", True))
        self.warnings, self.best_warnings = saves.Warnings("ppo"), saves.Warnings("ppo")

    def save(self, position: Position, extra: Mapping[str, Mapping[str, Tensor]]) -> bool:
        """Make a resumable save, with `extra` tensors by name of a file of their own; whether there is one. A full disk costs the save, not the run."""
        name = f"checkpoint-{position.iteration}"
        if name == self.saved and not self.stepped:  # asked for twice
            return True
        why = saves.store(self.folder, name, self.writer(position, extra), self.depends_on, keep=self._to_go_back_to(position))
        if why is None:
            self.saved, self.stepped = name, False
            from_rank_0("removing best policies", lambda: state.forget_bests(self.folder, state.kept_bests(position.monitor)))
        return self.warnings.outcome(f"the save after iteration {position.iteration}", why, self.saved)

    def _to_go_back_to(self, position: Position) -> list[str]:
        """The newest healthy save, which must outlive newer ones that are not, as this one is (rank 0): the guard goes back to it."""
        if rank() or not position.guard or not position.guard["guard"]["streak"]:
            return []
        for save in saves.saves(self.folder):
            with suppress(OSError, ValueError, KeyError, TypeError):
                if state.is_healthy(save):
                    return [save.name]
        return []

    def writer(self, position: Position, extra: Mapping[str, Mapping[str, Tensor]]) -> Callable[[Path], Failure | None]:
        """What writes this process's part of a save into a folder."""
        write = state.writer(self.module, self.optimizer, position, extra=extra)
        return lambda staging: attempted(lambda: write(staging)) if rank() == 0 else None

    def save_best(self, iteration: int, kept: Sequence[int]) -> None:
        """Keep the policy as it is, one of `kept`, and forget those that neither they nor a save may publish any more."""
        self.keep_best(iteration, kept, lambda: state.save_best(self.folder, self.module, iteration))

    def keep_best(self, iteration: int, kept: Sequence[int], write: Callable[[], Any]) -> None:
        """Have rank 0 `write` the policy; where that fails the run goes on, and what was the best before stays."""
        failed = saves.on_rank_0(f"best-{iteration}", write)
        if failed is None:
            from_rank_0("removing best policies", lambda: state.forget_bests(self.folder, kept))
        self.best_warnings.outcome(f"best-{iteration}", failed.words if failed else None, self.saved)

    def load_best(self, iteration: int) -> str | None:
        """Put a kept policy into the module that is published; what is wrong with it where that can't be done."""
        return from_rank_0("loading the best policy", lambda: state.load_best(self.folder, self.module, iteration))

    def restore(self, save: Path) -> None:
        """Put a verified save's weights and optimizer state into the run as it goes on."""
        state.restore(save, self.module, self.optimizer)

    def is_finite(self, *, whole: bool = False) -> bool:
        """Whether every number of the policy is finite, or of all that is trained."""
        tensors = state.trained_tensors(self.module) if whole else state.policy_tensors(self.module)
        return bool(torch.stack([torch.isfinite(p).all() for p in tensors.values()]).all())
