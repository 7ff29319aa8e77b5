"""Evaluation that is exact: sums over rows on all processes, then one division.

TRL's own numbers are means of batch means (ten pairs in batches of eight gave an accuracy of 0.5625), and a distributed
loader repeats rows to fill the last batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch

from stages.training.guarding import SkipSteps


class Measure(Protocol):
    """Sums of a batch by metric name: (sum, weight) scalars on the batch's device."""

    def __call__(self, trainer: Any, model: Any, inputs: dict[str, Any]) -> Mapping[str, tuple[torch.Tensor, torch.Tensor]]: ...


class Further(Protocol):
    """Metrics of the validation rows beside what a measure sums up, given what it found; every process calls it and gets the same."""

    def __call__(self, trainer: Any, found: Mapping[str, float], *, final: bool = False) -> dict[str, float]: ...


def exact(trainer_class: Any, measure: Measure) -> Any:
    """A subclass of a TRL trainer whose public `evaluate` is exact, and which shows a guard (where it is given one) every loss."""

    class Exact(trainer_class):
        skips: SkipSteps | None = None
        further: Further | None = None

        def evaluate(
            self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
        ) -> dict[str, float]:
            trainer: Any = self
            rows = trainer.eval_dataset if eval_dataset is None else eval_dataset
            was_training = trainer.model.training
            found = evaluate_exactly(trainer, rows, measure)
            if self.further is not None and eval_dataset is None:
                found |= self.further(trainer, found)
            metrics = {f"{metric_key_prefix}_{key}": value for key, value in found.items()}
            trainer.model.eval()  # TRL adds its unlogged training metrics to a log made in training mode
            trainer.log(dict(metrics))
            trainer.model.train(was_training)
            trainer.control = trainer.callback_handler.on_evaluate(trainer.args, trainer.state, trainer.control, metrics)
            return metrics

        def compute_loss(self, model: Any, *args: Any, **kwargs: Any) -> Any:
            found = super().compute_loss(model, *args, **kwargs)
            if self.skips is not None and model.training:
                self.skips.add_loss(found[0] if isinstance(found, tuple) else found)
            return found

        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            loss = super().training_step(*args, **kwargs)
            # The Trainer adds losses up and clears the sum by subtracting it from itself: one NaN would stay in every later log.
            return loss if self.skips is None else torch.where(torch.isfinite(loss), loss, 0.0)

        def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
            if self.skips is not None:
                self.skips.catch_up()  # on every process, of which one writes it down
            super()._save_checkpoint(*args, **kwargs)

        def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            super().log(logs if self.skips is None else self.skips.shown(logs), *args, **kwargs)

        def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
            trainer: Any = self
            if not (trainer.is_deepspeed_enabled and _internal_call):  # a resumable save holds DeepSpeed's shards: no need to gather the weights
                super().save_model(output_dir, _internal_call)

    return Exact


@torch.no_grad()
def evaluate_exactly(trainer: Any, rows: Any, measure: Measure, collate: Callable[[list[Any]], dict[str, Any]] | None = None) -> dict[str, float]:
    """Metrics over `rows`, each row once, whatever the batch size and the number of processes. `collate` is the trainer's unless given.

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
        batch = (collate or trainer.data_collator)([rows[i] for i in mine or [0]])
        inputs = {key: value.to(accelerator.device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
        with accelerator.autocast():
            sums = measure(trainer, model, inputs)
        for key, (total, weight) in sums.items():
            pair = torch.stack([total.double(), weight.double()]) * (1.0 if mine else 0.0)
            totals[key] = totals.get(key, 0) + pair
    model.train(was_training)
    reduced = {key: accelerator.reduce(pair.float() if pair.device.type == "mps" else pair, "sum") for key, pair in totals.items()}
    return {key: (total / weight).item() if weight else math.nan for key, (total, weight) in reduced.items()}
