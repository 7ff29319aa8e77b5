"""Evaluation that is exact: sums over rows on all processes, then one division.

TRL's own numbers are means of batch means (ten pairs in batches of eight gave an accuracy of 0.5625), and a distributed
loader repeats rows to fill the last batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from transformers import TrainerCallback

from configs.errors import UserError
from stages.training.progress import not_finite


class Measure(Protocol):
    """Sums of a batch by metric name: (sum, weight) scalars on the batch's device."""

    def __call__(self, trainer: Any, model: Any, inputs: dict[str, Any]) -> Mapping[str, tuple[torch.Tensor, torch.Tensor]]: ...


def exact(trainer_class: Any, measure: Measure) -> Any:
    """A subclass of a TRL trainer whose public `evaluate` is exact and whose steps stop at a non-finite loss."""

    class Exact(trainer_class):
        nonfinite: torch.Tensor | None = None

        def evaluate(
            self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
        ) -> dict[str, float]:
            trainer: Any = self
            rows = trainer.eval_dataset if eval_dataset is None else eval_dataset
            was_training = trainer.model.training
            metrics = {f"{metric_key_prefix}_{key}": value for key, value in evaluate_exactly(trainer, rows, measure).items()}
            trainer.model.eval()  # TRL adds its unlogged training metrics to a log made in training mode
            trainer.log(dict(metrics))
            trainer.model.train(was_training)
            trainer.control = trainer.callback_handler.on_evaluate(trainer.args, trainer.state, trainer.control, metrics)
            return metrics

        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            loss = super().training_step(*args, **kwargs)
            bad = ~torch.isfinite(loss.detach())
            self.nonfinite = bad if self.nonfinite is None else self.nonfinite | bad
            return loss

        def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
            trainer: Any = self
            if not (trainer.is_deepspeed_enabled and _internal_call):  # a resumable save holds DeepSpeed's shards: no need to gather the weights
                super().save_model(output_dir, _internal_call)

    return Exact


class StopAtNonFinite(TrainerCallback):
    """Raises before the optimizer would take a step whose loss or gradient is not finite on any process.

    Before, because weights that such a step has broken would go into the next save, and a resume would start from them.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """All ranks agree by a sum, so all of them raise and none waits for the others."""
        flags = torch.stack([self.trainer.nonfinite.float(), (~torch.isfinite(self.norm())).float().to(args.device)])
        loss, gradient = self.trainer.accelerator.reduce(flags, "sum").tolist()
        if loss or gradient:
            raise UserError(not_finite(f"the {'loss' if loss else 'gradient'} is not finite", state.global_step + 1))

    def norm(self) -> torch.Tensor:
        """The norm of the gradient, []. DeepSpeed has taken the step by now; no save was written since, so a resume is as sound."""
        if self.trainer.is_deepspeed_enabled:
            return torch.as_tensor(self.trainer.model_wrapped.get_global_grad_norm())
        gradients = [p.grad for p in self.trainer.model.parameters() if p.grad is not None]
        return torch.nn.utils.get_total_norm(gradients) if gradients else torch.zeros(())


@torch.no_grad()
def evaluate_exactly(trainer: Any, rows: Any, measure: Measure) -> dict[str, float]:
    """Metrics over `rows`, each row once, whatever the batch size and the number of processes.

    Every rank makes the same number of forward passes (ZeRO-3 and FSDP gather weights in each): one that has run out of
    rows repeats row 0 with weight 0.
    """
    sharded = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
    model = trainer.model_wrapped if sharded else trainer.model
    was_training = model.training
    model.eval()
    accelerator, size = trainer.accelerator, trainer.args.per_device_eval_batch_size
    stride = size * accelerator.num_processes
    totals: dict[str, torch.Tensor] = {}
    for start in range(0, len(rows), stride):
        first = start + accelerator.process_index * size
        mine = list(range(first, min(first + size, len(rows))))
        batch = trainer.data_collator([rows[i] for i in mine or [0]])
        inputs = {key: value.to(accelerator.device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
        with accelerator.autocast():
            sums = measure(trainer, model, inputs)
        for key, (total, weight) in sums.items():
            pair = torch.stack([total.double(), weight.double()]) * (1.0 if mine else 0.0)
            totals[key] = totals.get(key, 0) + pair
    model.train(was_training)
    reduced = {key: accelerator.reduce(pair.float() if pair.device.type == "mps" else pair, "sum") for key, pair in totals.items()}
    return {key: (total / weight).item() if weight else math.nan for key, (total, weight) in reduced.items()}


def stopped_early(log_history: list[dict[str, float]], patience: int | None) -> bool:
    """Whether the last `patience` evaluations brought no better loss: worked out from the history, so a resume agrees."""
    losses = [entry["eval_loss"] for entry in log_history if "eval_loss" in entry]
    return bool(losses and patience and len(losses) - 1 - losses.index(min(losses)) >= patience)


class StopEarly(TrainerCallback):
    """Ends training when the validation loss has not improved for `patience` evaluations."""

    def __init__(self, patience: int, say: Callable[[str], None]) -> None:
        self.patience, self.say = patience, say

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask the Trainer to stop."""
        if stopped_early(state.log_history, self.patience):
            self.say(f"stopped early: no better eval_loss in {self.patience} evaluations")
            control.should_training_stop = True
