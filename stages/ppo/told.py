"""PPO told to stop: between two phases or after an iteration, and without a save where the newest one holds all that is done.

Nothing but the iterations that are complete is kept: an iteration that is cut off is repeated alike, with the same prompts, samples and
minibatches. While the newest save is the last complete iteration's, a process that trains alone may therefore leave at once. One of several
waits for the end of the rollout: the others would die in a collective, with another exit code, where the signal reached it alone.
"""

from __future__ import annotations

from collections.abc import Callable

from stages.training import stop, watchdog
from stages.training.ranks import world_size


class Told:
    """Whether to stop, asked by every process at the same places. `saved`: the iteration that the newest save, or else the run's start, is of."""

    def __init__(self, saved: int, iterations: int) -> None:
        self.saved, self.iterations = saved, iterations
        self.agreement = stop.Agreement()

    def begin(self, iteration: int) -> None:
        """Before an iteration, counted from 0."""
        stop.saves_at_steps(iteration != self.saved or world_size() > 1)

    def between_phases(self, iteration: int, save: Callable[[], object]) -> None:
        """In an iteration before anything has been learned in it; `save` saves what it started from."""
        if self.agreement.now():
            self.leave(iteration, save)

    def end(self, iteration: int, save: Callable[[], object], *, due: bool) -> None:
        """After the iteration of this number, counted from 1: save where that is due or the run is to stop, and then stop."""
        stop.saves_at_steps(True)
        asked = self.agreement.now() if iteration < self.iterations else 0  # the last one is published instead
        if due and not asked:
            with watchdog.during("save"):
                self.saved = iteration if save() else self.saved
        if asked:
            self.leave(iteration, save)

    def finish(self) -> None:
        """After the last iteration, which has no save: it is published instead."""
        stop.mode(stop.Mode.FINISH)

    def leave(self, iteration: int, save: Callable[[], object]) -> None:
        """Save what is not saved yet, and leave."""
        stop.saves_at_steps(True)
        saved: object = iteration == self.saved
        if not saved:
            with watchdog.during("save"):
                saved = save()
        stop.leave(self.agreement.code, f"{'saved' if saved else 'could not save'} after iteration {iteration} of {self.iterations}")
