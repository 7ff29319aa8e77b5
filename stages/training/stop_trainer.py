"""How a Trainer stops when it is told to: a save after the step that all processes agree on, then the end."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from stages.training import stop


class StopWhenTold(TrainerCallback):
    """Asks for a save and for the end of training once all processes have agreed; then leaves. To be the last of a Trainer's callbacks."""

    def __init__(self) -> None:
        self.agreement = stop.Agreement()

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
            stop.leave(self.agreement.code, f"saved at step {state.global_step} of {state.max_steps}")

    def _stop(self, control: Any, code: int) -> None:
        if code:
            control.should_save = control.should_training_stop = True
