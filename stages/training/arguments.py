"""The one place that turns a stage's config into the arguments of a TRL trainer."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from configs.errors import UserError
from configs.extras import check_trainer_packages
from configs.schema import Full, SFTTrain, TRLStage
from configs.trainer_args import check_trainer
from stages.models import uses_bf16
from stages.training.plan import Plan
from stages.training.stopping import rule_of


def trl_arguments(cfg: TRLStage, stage: str, plan: Plan, resume_folder: Path, *, has_validation: bool) -> dict[str, Any]:
    """The arguments all three TRL configs share.

    Raises:
        UserError: `trainer:` sets an argument that the stage decides itself, or needs a package that is not installed, or early
            stopping has no validation rows.
    """
    import torch

    refuse_owned(cfg, stage)
    check_trainer_packages(cfg.trainer)
    train = cfg.train
    bf16 = uses_bf16(train.precision)
    # TrainingArguments takes mixed precision from this variable when neither bf16 nor fp16 is set: a machine file would win.
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if bf16 else "no"
    rule = rule_of(cfg)
    if rule and not has_validation:
        raise UserError(f"{rule.setting} needs validation rows, and there are none: raise split.validation, or leave it out")
    return _of_technique(cfg) | {
        "output_dir": str(resume_folder), "seed": cfg.seed, "data_seed": cfg.seed, "max_steps": plan.steps,
        "per_device_train_batch_size": train.micro_batch_size, "per_device_eval_batch_size": train.micro_batch_size,
        "gradient_accumulation_steps": plan.accumulation, "learning_rate": train.learning_rate, "lr_scheduler_type": train.schedule if train.schedule != "constant" else "constant_with_warmup",
        "warmup_steps": plan.warmup_steps, "weight_decay": train.weight_decay, "max_grad_norm": train.max_grad_norm,
        "bf16": bf16, "fp16": False, "use_cpu": not torch.cuda.is_available(), "gradient_checkpointing": train.gradient_checkpointing,
        "logging_steps": train.log_every, "logging_nan_inf_filter": False, "disable_tqdm": True, "report_to": "none",
        "eval_strategy": "steps" if has_validation else "no", "eval_steps": plan.eval_every,
        "save_strategy": "steps", "save_steps": plan.save_every, "save_total_limit": 2, "load_best_model_at_end": rule is not None,
        "metric_for_best_model": rule.key if rule else None, "greater_is_better": rule.higher if rule else None,
        # The rows come in the order of `row_order`, once through; every batch is full.
        "train_sampling_strategy": "sequential", "dataloader_pin_memory": torch.cuda.is_available(),
    } | cfg.trainer  # fmt: skip


def _of_technique(cfg: TRLStage) -> dict[str, Any]:
    """Arguments that follow from what is trained, and how."""
    technique, train = cfg.technique, cfg.train
    thaws = isinstance(technique, Full) and technique.freeze is not None and technique.freeze.unfreeze_every is not None
    noise = train.neftune_alpha if isinstance(train, SFTTrain) else None
    return {"ddp_find_unused_parameters": thaws, "neftune_noise_alpha": noise}  # DDP waits for gradients of layers that are frozen for now, unless told to look


def refuse_owned(cfg: TRLStage, stage: str) -> None:
    """Raise for `trainer:` keys that the stage decides itself, or that TRL does not have, as reading a config file does."""
    problems = [f"trainer.{problem}" for problem in check_trainer(stage, cfg.trainer)]
    if problems:
        raise UserError("; ".join(problems))
