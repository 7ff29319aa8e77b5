"""The guard of SFT, reward model and DPO: steps whose numbers have gone bad are not taken, and several in a row undo what led to them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from configs.errors import UserError
from configs.schema.guard import Guard as GuardConfig
from stages.guard.skip import innermost, skip_if
from stages.guard.verdict import Guard, Skipped
from stages.training import rollback, watchdog
from stages.training.progress import SKIPPED, remedy
from stages.training.ranks import say
from stages.training.saves import number_of

LOSS, NORM = "loss", "gradient"
SHOWN = 3  # skipped steps that are named one by one at a log


class SkipSteps(TrainerCallback, ExportableState):
    """Judges every optimizer step by the loss over all ranks and the gradient's norm, just before the optimizer takes it.

    Under DeepSpeed the step is taken inside of the backward pass, and its own norm is read; it has the optimizer inside skip a step
    in float32, and steps in bf16 whatever the norm is. `rows` gives the training rows of an optimizer step (from 1).
    """

    def __init__(self, trainer: Any, cfg: GuardConfig, rows: Callable[[int], Sequence[int]]) -> None:
        self.trainer, self.cfg, self.rows = trainer, cfg, rows
        self.guard = Guard(cfg, (LOSS, NORM), trainer.args.device)
        self.fallen: int | None = None  # the save that the run has gone back to, until it has got further than that
        self.good_since = False
        self.loss: torch.Tensor | None = None
        self.flag: torch.Tensor | None = None
        self.clipped: Any = None
        self.arriving: Any = None
        self.unlogged: list[Skipped] = []

    # -- one optimizer step

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Go on from what the save remembers, and be asked before every step."""
        if saved := (state.stateful_callbacks or {}).get(type(self).__name__):
            self.load(saved["attributes"])
        else:  # of a save made without a guard
            state.stateful_callbacks[type(self).__name__] = self.state()
        accelerator = self.trainer.accelerator
        clip = accelerator.clip_grad_norm_

        def observed(*arguments: Any, **keywords: Any) -> Any:
            self.clipped = clip(*arguments, **keywords)
            return self.clipped

        accelerator.clip_grad_norm_ = observed
        self.inner = innermost(self.trainer.optimizer)
        self.inner.register_step_pre_hook(lambda optimizer, *_: skip_if(self.decide(state.global_step + 1), optimizer))

    def add_loss(self, loss: torch.Tensor) -> None:
        """Take in a micro-batch's loss, before its backward pass. After the last one they are summed over the ranks while that runs."""
        loss = loss.detach().float().mean()
        self.loss = loss if self.loss is None else self.loss + loss
        if self.trainer.accelerator.sync_gradients and self.trainer.accelerator.num_processes > 1:
            self.arriving = torch.distributed.all_reduce(self.loss, async_op=True)

    def decide(self, step: int) -> torch.Tensor:
        """1 where the step must not be taken, else 0: [] float32, on the device, decided once a step."""
        if self.flag is None:
            if self.arriving is not None:
                self.arriving.wait()
            assert self.loss is not None
            self.flag = self.guard.judge(step, torch.stack([self.loss, self.norm()]))
        return self.flag

    def norm(self) -> torch.Tensor:
        """The norm of the gradient over all ranks before it was clipped, []; NaN where DeepSpeed says that it is not finite."""
        found = rollback.deepspeed_norm(self.trainer.model_wrapped) if self.trainer.is_deepspeed_enabled else self.clipped
        found = found.full_tensor() if hasattr(found, "full_tensor") else found
        norm = torch.as_tensor(found, dtype=torch.float32, device=self.trainer.args.device)
        return torch.where(norm < 0, math.nan, norm)

    # -- what is said and done about it, when something is logged, evaluated or saved anyway

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Forget the step; look at the verdicts where that costs no waiting of its own."""
        if self.flag is None:  # DeepSpeed called the step off itself, and the Trainer then leaves the schedule behind
            self.decide(state.global_step)
            self.trainer.lr_scheduler.step()
        self.flag = self.loss = self.arriving = None
        if control.should_log or control.should_evaluate or control.should_save:
            self.look(state, control)

    def look(self, state: Any, control: Any) -> None:
        """Go back to a save where too much was skipped, and make none by itself while steps are skipped.

        Raises:
            UserError: there is no way back.
        """
        found = self.catch_up()
        broken = control.should_save and not rollback.weights_are_finite(self.trainer)
        if broken or self.guard.longest >= self.cfg.max_skipped_in_row:
            if not broken and self.is_trained(state):
                control.should_save = control.should_save and not self.guard.streak
                say(f"warning: {self.reason(found)}. No step is left: the weights are those of the last step that was taken, {state.global_step - self.guard.streak}")
            else:
                self.go_back("a trained weight is not finite" if broken else self.reason(found), state)
        elif self.guard.streak:
            control.should_save = False

    def catch_up(self) -> list[Skipped]:
        """Read what was decided since it was last read, and name what was skipped. Every process calls it alike."""
        before, steps = self.guard.skipped, len(self.guard.unread)
        found = self.guard.read()
        self.unlogged += found
        self.good_since |= self.guard.skipped - before < steps
        self.name(found)
        return found

    def name(self, found: Sequence[Skipped]) -> None:
        """A warning for each of the first steps, with its rows."""
        for skipped in found[:SHOWN]:
            rows = self.rows(skipped.step)
            say(f"warning: step {skipped.step} is skipped: {skipped}; its training rows: {', '.join(map(str, rows[:32]))}{' …' if len(rows) > 32 else ''}")
        if len(found) > SHOWN:
            say(f"warning: {len(found) - SHOWN} more steps are skipped, up to step {found[-1].step}")

    def is_trained(self, state: Any) -> bool:
        """Whether this is the end of a run that took at least half of its steps, some of them since it last went back: steps that were not taken have
        changed nothing, so what it has learned until then is whole."""
        at_end, taken = state.global_step >= state.max_steps, state.global_step - self.guard.skipped
        return at_end and 2 * taken >= state.global_step and (self.fallen is None or self.good_since)

    def reason(self, found: Sequence[Skipped]) -> str:
        """What led to going back. `found` holds the last of the steps that were skipped in a row, which may be over by now."""
        last = next(skipped for skipped in found if skipped.step == self.guard.longest_end)
        return f"{self.guard.longest} optimizer steps in a row were skipped, the last because {last}"

    def go_back(self, why: str, state: Any) -> None:
        """Put the weights and the optimizer of the newest healthy save in place. Position, schedule and random numbers stay: the rows
        since that save, which led here, are not trained on again.

        Raises:
            UserError: there is no such save, it was already gone back to, or no step is left to show that it helped.
        """
        with watchdog.during("load"):  # hours of reading are no hang
            save = rollback.healthy_save(self.trainer.args.output_dir)
        step = state.global_step
        kept = f"the last healthy save is {save}" if save else "there is no healthy save yet"
        advice = remedy(self.trainer.args)
        if self.fallen is not None and not self.made_headway(save):
            raise UserError(f"{why} at step {step}, again after the run had gone back to the save of step {self.fallen}; {kept}. {advice}")
        if save is None or step >= state.max_steps or self.trainer.is_fsdp_enabled:
            raise UserError(f"{why} at step {step}; {kept}. {advice}")
        with watchdog.during("load"):
            rollback.restore(self.trainer, save)
        self.fallen, self.good_since = number_of(save), False
        self.guard.forget_streak()
        say(f"warning: {why}. Back to the weights and the optimizer of {save.name}; the rows of steps {self.fallen + 1} to {step} are not trained on again")

    def made_headway(self, save: Any) -> bool:
        """Whether a save was made since the run went back, of steps that were taken after it."""
        return save is not None and self.fallen is not None and number_of(save) > self.fallen and rollback.remembers(save).get("good_since", False)

    def shown(self, logs: dict[str, float]) -> dict[str, float]:
        """A training log as it should be read: NaN where a loss or the last norm was none, and how many steps were skipped so far."""
        if "loss" not in logs:
            return logs
        last = self.unlogged[-1] if self.unlogged and self.guard.streak else None
        shown = {**logs, SKIPPED: self.guard.skipped}
        if any(LOSS in skipped.not_finite for skipped in self.unlogged):
            shown["loss"] = math.nan
        if last is not None and NORM in last.not_finite:
            shown["grad_norm"] = math.nan
        self.unlogged.clear()
        return shown

    def state(self) -> dict[str, Any]:
        """What stands in every save's trainer_state.json, once everything was read."""
        attributes = {"guard": self.guard.state(), "fallen": self.fallen, "good_since": self.good_since, "unlogged": self.unlogged}
        return {"args": {}, "attributes": json.loads(json.dumps(attributes))}

    def load(self, saved: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.guard.load(saved["guard"])
        self.fallen, self.good_since = saved["fallen"], saved["good_since"]
        self.unlogged = [Skipped(step, tuple(names), tuple(map(tuple, spikes))) for step, names, spikes in saved["unlogged"]]
