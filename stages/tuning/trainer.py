"""A TRL trainer that trains as the config's technique says: what is frozen, what learns faster, what the adapter started from."""

from __future__ import annotations

from typing import Any

import torch

from configs.schema import Full, SFTTrain, TRLStage, lora_of
from stages.loss.trainer import usual
from stages.training.ranks import say
from stages.training.trainer_saves import settings_of
from stages.tuning import published
from stages.tuning.freezing import Thaw
from stages.tuning.quantized import is_packed
from stages.tuning.smoothing import LastHidden, above_mean

FACTORS = (".ia3_l.", ".lora_magnitude_vector.")  # what activations are multiplied by (IA3), or how large outputs are (DoRA)


def tuned(trainer_class: Any, cfg: TRLStage) -> Any:
    """A subclass of a trainer class for the technique of `cfg`."""
    smoothing = cfg.train.label_smoothing if isinstance(cfg.train, SFTTrain) else 0.0

    class Tuned(trainer_class):
        thaw: Thaw | None = None
        initial: dict[str, torch.Tensor] | None = None  # what PiSSA and OLoRA took out of the base
        hidden: LastHidden | None = None  # where smoothing is added to TRL's loss

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            begin(self, cfg)
            if smoothing and not (getattr(self, "token_sums", False) and usual(self)):  # the loss in chunks smooths by itself
                self.hidden = LastHidden(self.model)

        def get_decay_parameter_names(self, model: Any) -> list[str]:
            """Without factors: decay would draw them to 0, and with them the frozen model, where that of an update draws it to none."""
            return [name for name in super().get_decay_parameter_names(model) if not any(part in f"{name}." for part in FACTORS)]

        def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
            made = self.optimizer is None
            optimizer, lora = super().create_optimizer(*args, **kwargs), lora_of(cfg)
            if made:
                if lora is not None and lora.learning_rate_ratio is not None:
                    faster_b(optimizer, self.model, lora.learning_rate_ratio)
                self.configured = settings_of(self)  # before anything is loaded: DeepSpeed loads a save by itself
            return optimizer

        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            if self.thaw is not None:
                self.thaw.at(self.state.global_step)
            return super().training_step(*args, **kwargs)

        def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
            if self.hidden is None or not self.model.training:
                return super().compute_loss(model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)
            assert not return_outputs
            labels = inputs["labels"]
            loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
            count = (labels[:, 1:] != -100).sum() if num_items_in_batch is None else num_items_in_batch
            share = 1 if num_items_in_batch is None else self.accelerator.num_processes  # the count is that of all processes, over which gradients are averaged
            return loss + smoothing * above_mean(self.hidden.take(), labels, self.hidden.head) * share / torch.as_tensor(count).clamp(min=1)

    return Tuned


def begin(trainer: Any, cfg: TRLStage) -> None:
    """Freeze what is to be frozen, and remember what the adapter started from."""
    technique, lora = cfg.technique, lora_of(cfg)
    if isinstance(technique, Full) and technique.freeze is not None:
        trainer.thaw = Thaw(trainer.model, technique.freeze)
        say(str(trainer.thaw))
    if lora is not None and lora.changes_base:
        trainer.initial = published.remember(trainer.model)
    if is_packed(trainer.model):
        in_float32(trainer.model)


def in_float32(model: Any) -> None:
    """Keep what is trained over a quantised base in float32: TRL casts it to bf16, in which AdamW's small steps are lost."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def faster_b(optimizer: Any, model: Any, ratio: float) -> None:
    """Give the B matrices groups of their own with `ratio` times the learning rate (LoRA+, Hayou et al. 2024, arXiv:2402.12354)."""
    b = {id(value) for name, value in model.named_parameters() if ".lora_B." in name or ".lora_embedding_B." in name}
    for group in list(optimizer.param_groups):
        own = [value for value in group["params"] if id(value) in b]
        if own:
            group["params"] = [value for value in group["params"] if id(value) not in b]
            optimizer.add_param_group({key: value for key, value in group.items() if key != "params"} | {"params": own, "lr": group["lr"] * ratio})
