"""What an evaluation sums up, per stage: tokens count alike in SFT, pairs count alike in the reward model and in DPO."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F

from configs.schema import DPOStage
from stages.compat import token_statistics

Sums = dict[str, tuple[torch.Tensor, torch.Tensor]]  # metric -> (sum, weight)


def tokens(trainer: Any, model: Any, inputs: dict[str, Any]) -> Sums:
    """Loss in nats per completion token, and the share of them that have the highest probability."""
    if getattr(trainer, "token_sums", False):
        sums = model(**inputs, token_sums=True)
        return {"loss": (sums.loss, sums.counted), "token_accuracy": (sums.correct, sums.counted)}
    statistics = token_statistics(model, inputs, inputs["labels"])
    count = statistics.counted.sum()
    return {"loss": (-statistics.logprobs.double().sum(), count), "token_accuracy": (statistics.correct.sum(), count)}


def bradley_terry_loss(chosen: torch.Tensor, rejected: torch.Tensor, margin: torch.Tensor | float = 0.0) -> torch.Tensor:
    """-log sigmoid(chosen - rejected - margin), [B] nats (Ouyang et al. 2022, eq. 1; margin: Touvron et al. 2023, eq. 2)."""
    return -F.logsigmoid(chosen - rejected - margin)


def scored_pairs(trainer: Any, model: Any, inputs: dict[str, Any]) -> Sums:
    """Bradley-Terry loss (without the centring term), share of pairs in the right order, and mean difference of scores."""
    scores = model(**{key: value for key, value in inputs.items() if key != "margin"}, use_cache=False).logits.squeeze(-1).float()
    chosen, rejected = scores.chunk(2)
    count = torch.tensor(float(len(chosen)), device=scores.device)
    right = (chosen > rejected).double() + 0.5 * (chosen == rejected).double()
    return {
        "loss": (bradley_terry_loss(chosen, rejected, inputs.get("margin", 0.0)).sum(), count),
        "accuracy": (right.sum(), count), "margin": ((chosen - rejected).sum(), count),
    }  # fmt: skip


def preferred_pairs(trainer: Any, model: Any, inputs: dict[str, Any]) -> Sums:
    """DPO's loss, share of pairs whose implicit reward is in the right order, and mean difference of implicit rewards."""
    labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
    batch = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    policy = token_statistics(model, batch, labels).logprobs.float().sum(1)
    reference, around = reference_of(trainer, model)
    with around:
        ratios = policy - token_statistics(reference, batch, labels).logprobs.float().sum(1)
    chosen, rejected = ratios.chunk(2)
    margin = trainer.beta * (chosen - rejected)
    count = torch.tensor(float(len(chosen)), device=ratios.device)
    # Any other loss is TRL's own, on batches of one pair (see `dpo_batches`): its gathers need batches of one size.
    loss = -F.logsigmoid(margin).sum() if is_plain_dpo(trainer.args) else trainer.compute_loss(model, inputs)
    right = (margin > 0).double() + 0.5 * (margin == 0).double()
    return {"loss": (loss, count), "rewards/accuracies": (right.sum(), count), "rewards/margins": (margin.sum(), count)}


def reference_of(trainer: Any, model: Any) -> tuple[Any, Any]:
    """The model that gives reference log-probs, and the context to call it in: adapters off where there is no separate one."""
    if trainer.ref_model is not None:
        return trainer.ref_model, nullcontext()
    return model, trainer.accelerator.unwrap_model(model).disable_adapter()


def is_plain_dpo(args: Any) -> bool:
    """Whether the loss is -log sigmoid(beta * difference of log-ratios) and nothing else."""
    losses = args.loss_type if isinstance(args.loss_type, list) else [args.loss_type]
    modified = args.ld_alpha is not None or args.use_weighting or args.loss_weights
    return losses == ["sigmoid"] and args.f_divergence_type == "reverse_kl" and not modified


def dpo_batches(cfg: DPOStage) -> dict[str, Any]:
    """Evaluation batches of one pair where the loss is TRL's own: it gathers over processes and gives a mean."""
    changed = {"f_divergence_type", "ld_alpha", "use_weighting", "loss_weights"} & set(cfg.trainer)
    return {} if cfg.loss_type == "sigmoid" and not changed else {"per_device_eval_batch_size": 1}
