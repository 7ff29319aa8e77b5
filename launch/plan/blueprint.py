"""The models of a stage, built from their configs within a simulation: the stages' own classes, weights without data."""

from __future__ import annotations

from typing import Any

import torch

from launch.plan.job import Job
from stages import models
from stages.dropout import without_dropout
from stages.tuning.adapters import check_lora_targets, lora_config


def policy(job: Job, *, frozen: bool = False, config: Any = None) -> Any:
    """The causal language model that a stage loads; `frozen` is one under adapters."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(config or job.config, dtype=_dtype(job, frozen), attn_implementation=job.attn_implementation)
    models.resize_to(model, job.vocabulary)
    return without_dropout(model)


def _dtype(job: Job, frozen: bool) -> torch.dtype:
    return torch.bfloat16 if job.bf16 and (frozen or job.pure_bf16) else torch.float32


def scorer(job: Job, *, frozen: bool = False, config: Any = None) -> Any:
    """A sequence classifier with one output."""
    from transformers import AutoModelForSequenceClassification

    config = config or job.config
    config = type(config).from_dict(config.to_dict() | {"num_labels": 1, "pad_token_id": 0})
    model = AutoModelForSequenceClassification.from_config(config, dtype=_dtype(job, frozen), attn_implementation=job.attn_implementation)
    models.resize_to(model, job.vocabulary)
    return without_dropout(model)


def adapted(model: Any, job: Job, task: str, name: str = "default") -> Any:
    """The model under the adapters of `lora:`, as the stage makes it."""
    from peft import get_peft_model

    assert job.lora is not None
    check_lora_targets(model, job.lora)
    return get_peft_model(model, lora_config(job.lora, task), adapter_name=name)


def checkpoint_layers(job: Job, *trunks: Any) -> None:
    """Recompute activations in the backward pass, where the stage does."""
    for trunk in trunks if job.checkpointing else ():
        trunk.gradient_checkpointing_enable({"use_reentrant": False})
        trunk.train()


def size_of(tensors: Any) -> int:
    """Bytes of tensors."""
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())
