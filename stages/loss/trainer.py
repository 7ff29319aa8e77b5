"""SFT's trainer with the loss in chunks, in place of TRL's fused head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from configs.errors import UserError
from configs.schema import SFTTrain
from stages.compat import head_may_be_adapted
from stages.loss.head import plain
from stages.loss.model import add_token_sums, add_whole_sums, prove
from stages.training.ranks import say
from stages.zero import gather


def trainer_class(base: Any, model: Any, train: SFTTrain, row: Sequence[int]) -> Any:
    """TRL's SFTTrainer `base`, or a subclass whose loss is computed in chunks where the model allows that; the model is prepared for it.

    `row`: token ids of a row to prove it on. A collective under ZeRO-3.
    """
    chunk = train.loss_chunk
    if chunk is None:
        return base
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    own = model.forward
    add_token_sums(model, None if chunk == "auto" else int(chunk))
    if reason := prove(model, row):
        model.forward = own
        add_whole_sums(model)
        say(f"warning: loss_chunk: {type(model).__name__}: {reason}; the loss is computed from whole logits, which takes memory")
    return summed(base, train.label_smoothing)


def summed(base: Any, smoothing: float = 0.0) -> Any:
    """A subclass of SFTTrainer for a model with token sums. The loss is normalised as TRL's is; metrics are over tokens, not means of means."""

    class Summed(base):
        token_sums = True  # the model gives them, in evaluation too

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.seen: torch.Tensor | None = None  # (correct, entropy, counted) since the last log, of this process; kept in resumable saves
            with head_may_be_adapted():
                super().__init__(*args, **kwargs)
            refuse_split_adapter(self.model)

        def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
            if return_outputs or not usual(self):
                return super().compute_loss(model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)
            sums = model(**inputs, use_cache=False, token_sums=True, label_smoothing=smoothing)
            count = sums.counted if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
            loss = sums.loss / count.clamp(min=1)
            if self.args.average_tokens_across_devices and num_items_in_batch is not None:
                loss = loss * (self.accelerator.num_processes // self.get_tp_size())  # DDP averages gradients, and the count is of all
            if model.training:
                seen = torch.stack([sums.correct, sums.entropy, sums.counted]).detach()
                self.seen = seen if self.seen is None else self.seen + seen
            return loss.float()

        def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            if self.seen is not None and self.model.training:
                correct, entropy, counted = self.accelerator.reduce(self.seen, "sum").tolist()
                self._metrics["train"].update({"mean_token_accuracy": [correct / max(counted, 1)], "entropy": [entropy / max(counted, 1)]})
                self.seen = None
            super().log(logs, *args, **kwargs)

    return Summed


def refuse_split_adapter(model: Any) -> None:
    """Raise where the output head has an adapter and ZeRO-3 splits it: its gradients are found chunk by chunk, between DeepSpeed's own gathers.

    Raises:
        UserError: so it is.
    """
    head = model.get_output_embeddings()
    if head is not None and plain(head) is None and any(gather.is_split(parameter) for parameter in head.parameters()):
        raise UserError("an adapter on the output head cannot be trained under ZeRO-3; take the head out of target_modules, or use ZeRO-2")


def usual(trainer: Any) -> bool:
    """Whether the loss is the cross-entropy of labels and nothing else: others are TRL's own."""
    parallel = trainer.accelerator.parallelism_config
    return trainer.args.loss_type == "nll" and trainer.compute_loss_func is None and not trainer.aux_loss_enabled and (parallel is None or not parallel.sp_enabled)
