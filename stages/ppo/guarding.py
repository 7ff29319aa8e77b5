"""The guard of a PPO run: what it says of an iteration's steps, and the way back to the newest healthy save."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from configs.errors import UserError
from configs.schema import PPOStage
from stages import models
from stages.guard.verdict import GoneBadError, Guard, Skipped
from stages.ppo import state
from stages.ppo.published import PolicyAverage
from stages.ppo.state import Position
from stages.ppo.store import Store
from stages.ppo.update import SIGNALS
from stages.training import saves
from stages.training.ranks import from_rank_0, say


class Undo:
    """Takes back iterations whose numbers have gone bad. Every process decides alike: norms are of all processes' gradients.

    The run goes on with the weights and the optimizer of the newest healthy save and with the next iteration's prompts: those of the
    iterations in between are not learned from again, and learning rate, kl_coef and evaluations stay where they are.
    """

    def __init__(self, cfg: PPOStage, device: Any, store: Store, average: PolicyAverage | None, saved: dict[str, Any] | None) -> None:
        self.cfg, self.store, self.average = cfg, store, average
        self.guard = Guard(cfg.guard, SIGNALS, device)
        self.fallen: int | None = None  # the save that the run has gone back to
        self.fell_at = 0  # the iterations done then: a save up to there holds nothing that was learned since
        if saved is not None:
            self.guard.load(saved["guard"])
            self.fallen = saved["fallen"]
            self.fell_at = saved.get("fell_at", self.fallen or 0)

    def record(self) -> dict[str, Any]:
        """What a save has to hold of it."""
        self.guard.read()
        return {"guard": self.guard.state(), "fallen": self.fallen, "fell_at": self.fell_at}

    def save(self, position: Position) -> bool:
        """Write a resumable save, whether it was due or somebody asked for it; never one of weights that are not finite. Whether that worked."""
        if not self.store.is_finite(whole=True):
            say(f"warning: no save is made after iteration {position.iteration}: a trained weight is not finite")
            return False
        return self.store.save(position, {"ema": self.average.tensors} if self.average else {})

    def check(self, iteration: int, *, saved_next: bool) -> None:
        """Look at what the iteration (from 0) did, and name the steps that were skipped.

        Raises:
            GoneBadError: too many steps in a row were skipped, or (where the weights are about to be saved or published) one is not finite.
        """
        self.name(iteration)
        if self.guard.longest >= self.cfg.guard.max_skipped_in_row:  # also where a later step of the iteration was taken
            raise GoneBadError(f"{self.guard.longest} optimizer steps in a row were skipped")
        if saved_next and not self.store.is_finite(whole=True):
            raise GoneBadError("a trained weight is not finite")

    def name(self, iteration: int) -> list[Skipped]:
        """One warning for the steps of an iteration that were skipped."""
        if found := self.guard.read():
            steps = ", ".join(str(skipped.step) for skipped in found)
            say(f"warning: iteration {iteration + 1}: {len(found)} optimizer step(s) of the run are skipped ({steps}): {found[0]}")
        return found

    def go_back(self, why: str, iteration: int) -> dict[str, float]:
        """Put the newest healthy save's weights and optimizer in place, unless fewer steps than that takes were called off, all for spikes; returns what
        metrics.jsonl says of the iteration (from 0). A collective.

        Raises:
            UserError: there is no such save, it was already gone back to, or no iteration is left to show that it helped.
        """
        found = self.name(iteration)
        if found and self.guard.longest < self.cfg.guard.max_skipped_in_row and not any(skipped.not_finite for skipped in found):
            say(f"warning: iteration {iteration + 1}: nothing is learned from it, the gradients of all its steps are spikes; weights and optimizer are as they were")
            return {"train/skipped_steps": self.guard.skipped}
        save = from_rank_0("looking for a healthy save", lambda: healthy_save(self.store.folder))
        kept = f"the last healthy save is {save}" if save else "there is no healthy save yet"
        remedy = f"Lower train.learning_rate{' or use train.precision: fp32' if models.uses_bf16(self.cfg.train.precision) else ''}, and run again"
        if save is not None and self.fallen is not None and saves.number_of(save) <= self.fell_at:
            raise UserError(f"iteration {iteration + 1}: {why}, again after the run had gone back to the save of iteration {self.fallen}; {kept}. {remedy}")
        if save is None or iteration + 1 >= self.cfg.train.iterations or not self.cfg.guard.enabled:
            raise UserError(f"iteration {iteration + 1}: {why}; {kept}. {remedy}")
        self.store.restore(save)
        saves.retire_newer(save)
        if self.average is not None and (tensors := state.load_extra(save, "ema")) is not None:
            self.average.load(tensors)
        self.fallen, self.fell_at = saves.number_of(save), iteration + 1
        self.guard.forget_streak()
        say(f"warning: iteration {iteration + 1}: {why}. Back to the weights and the optimizer of {save.name}; the prompts since then are not learned from again")
        return {"train/skipped_steps": self.guard.skipped, "train/back_to_iteration": self.fallen}


def healthy_save(folder: Path) -> Path | None:
    """The newest save that verifies and whose last optimizer step was taken."""
    for save in saves.saves(folder):
        if saves.problem(save) is None and state.is_healthy(save):
            return save
    return None
