"""The one place that turns a stage's config into the arguments of a TRL trainer."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from configs.errors import UserError
from configs.extras import check_trainer_packages
from configs.schema import TRLStage
from stages.models import uses_bf16
from stages.training.plan import Plan

# Arguments the stage itself decides, and what to set instead of them under `trainer:`.
OWNED = {
    "output_dir": "output", "seed": "seed", "data_seed": "seed", "max_steps": "train.max_steps", "num_train_epochs": "train.epochs",
    "per_device_train_batch_size": "train.micro_batch_size", "gradient_accumulation_steps": "train.batch_size",
    "learning_rate": "train.learning_rate", "lr_scheduler_type": "train.schedule", "warmup_steps": "train.warmup",
    "weight_decay": "train.weight_decay", "max_grad_norm": "train.max_grad_norm", "bf16": "train.precision", "fp16": "train.precision",
    "gradient_checkpointing": "train.gradient_checkpointing", "logging_steps": "train.log_every", "eval_steps": "train.eval_every",
    "eval_strategy": "train.eval_every", "save_steps": "train.save_every", "save_strategy": "train.save_every",
    "load_best_model_at_end": "train.early_stopping_patience", "max_length": "max_length", "packing": "packing", "beta": "beta",
    "loss_type": "loss_type", "label_smoothing": "label_smoothing", "center_rewards_coefficient": "center_coefficient",
    "train_sampling_strategy": None, "logging_nan_inf_filter": None, "remove_unused_columns": None, "dataset_kwargs": None,
    "dataloader_drop_last": None, "save_total_limit": None, "metric_for_best_model": None, "resume_from_checkpoint": None,
    "padding_free": "packing", "precompute_ref_log_probs": None, "sync_ref_model": None, "average_tokens_across_devices": None,
    "save_only_model": None, "auto_find_batch_size": None, "ignore_data_skip": None, "per_device_eval_batch_size": "train.micro_batch_size", "disable_dropout": None, "restore_callback_states_from_checkpoint": None,
}  # fmt: skip


def trl_arguments(cfg: TRLStage, plan: Plan, resume_folder: Path, *, has_validation: bool) -> dict[str, Any]:
    """The arguments all three TRL configs share.

    Raises:
        UserError: `trainer:` sets an argument that the stage decides itself, or needs a package that is not installed.
    """
    import torch

    refuse_owned(cfg)
    check_trainer_packages(cfg.trainer)
    train = cfg.train
    bf16 = uses_bf16(train.precision)
    # TrainingArguments takes mixed precision from this variable when neither bf16 nor fp16 is set: a machine file would win.
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if bf16 else "no"
    best = bool(train.early_stopping_patience and has_validation)
    return {
        "output_dir": str(resume_folder), "seed": cfg.seed, "data_seed": cfg.seed, "max_steps": plan.steps,
        "per_device_train_batch_size": train.micro_batch_size, "per_device_eval_batch_size": train.micro_batch_size,
        "gradient_accumulation_steps": plan.accumulation, "learning_rate": train.learning_rate, "lr_scheduler_type": train.schedule if train.schedule != "constant" else "constant_with_warmup",
        "warmup_steps": plan.warmup_steps, "weight_decay": train.weight_decay, "max_grad_norm": train.max_grad_norm,
        "bf16": bf16, "fp16": False, "use_cpu": not torch.cuda.is_available(), "gradient_checkpointing": train.gradient_checkpointing,
        "logging_steps": train.log_every, "logging_nan_inf_filter": False, "disable_tqdm": True, "report_to": "none",
        "eval_strategy": "steps" if has_validation else "no", "eval_steps": plan.eval_every,
        "save_strategy": "steps", "save_steps": plan.save_every, "save_total_limit": 2, "load_best_model_at_end": best,
        "metric_for_best_model": "eval_loss" if best else None, "greater_is_better": False if best else None,
        # The rows come in the order of `row_order`, once through; every batch is full.
        "train_sampling_strategy": "sequential", "dataloader_pin_memory": torch.cuda.is_available(), "ddp_find_unused_parameters": False,
    } | cfg.trainer  # fmt: skip


def refuse_owned(cfg: TRLStage) -> None:
    """Raise for `trainer:` keys that the stage decides itself, naming the config key to use."""
    found = [key for key in cfg.trainer if key in OWNED]
    if found:
        advice = "; ".join(f"trainer.{key}: " + (f"set {OWNED[key]} instead" if OWNED[key] else "leave it out, the stage decides it") for key in found)
        raise UserError(f"the stage decides these itself: {advice}")
