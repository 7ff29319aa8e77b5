"""A Trainer's callbacks that stop it when it is told to, after a save that all processes agree on, and that show the watchdog that it moves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from stages.training import stop, watchdog
from stages.training.rollback import weights_are_finite


class StopWhenTold(TrainerCallback):
    """Asks for a save and for the end of training once all processes have agreed; then leaves. To be the last of a Trainer's callbacks.

    Weights that are not finite go into no save: the run then leaves with the newest one that it has, and the next start goes on from there.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.agreement = stop.Agreement()
        self.finite = True  # the weights, when all had agreed

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """From here on there is something to save."""
        stop.saves_at_steps(True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The Trainer saves after this, and after an evaluation that is due at the same step."""
        if state.global_step < state.max_steps:
            self._stop(control, self.agreement.at_step_end())

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """An evaluation may have taken minutes, and the Trainer saves after it as well."""
        if state.global_step < state.max_steps and not control.should_training_stop:
            self._stop(control, self.agreement.now())

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The Trainer would now load the best model so far, which nobody needs."""
        if self.agreement.code:
            args.load_best_model_at_end = False

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Where they were told to stop, all have saved: raises SystemExit. Else what is left is to evaluate and publish."""
        if not self.agreement.code:
            stop.mode(stop.Mode.FINISH)
        else:
            saved = (Path(args.output_dir) / f"checkpoint-{state.global_step}").is_dir()
            how = "saved" if saved else "could not save" if self.finite else "nothing is saved, for a trained weight is not finite,"
            stop.leave(self.agreement.code, f"{how} at step {state.global_step} of {state.max_steps}")

    def _stop(self, control: Any, code: int) -> None:
        if code:
            self.finite = weights_are_finite(self.trainer)
            control.should_save, control.should_training_stop = self.finite, True


class Beats(TrainerCallback):
    """Tells the watchdog the phase, and every micro-batch. To be after those that ask for saves."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The first update begins."""
        watchdog.phase("update", state.global_step)

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A micro-batch that no optimizer step follows."""
        watchdog.beat()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The Trainer evaluates and saves next, where that is due."""
        watchdog.phase("eval" if control.should_evaluate else "save" if control.should_save else "update", state.global_step)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """And saves after an evaluation."""
        watchdog.phase("save" if control.should_save else "update")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The next update begins."""
        watchdog.phase("update")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """What is left is evaluated."""
        watchdog.phase("eval")
