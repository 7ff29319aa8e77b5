"""Hours and tokens a second of a planned stage, by the model of launch/scale."""

from __future__ import annotations

import functools
import json
from typing import Any

from launch.plan.gpus import Device
from launch.plan.jobs import Work
from launch.plan.layout import Layout
from launch.scale import Device as Chip
from launch.scale import Efficiency, Hardware, ModelShape, PlanFacts, named
from launch.scale.hardware import NVLINK3, NVLINK4, PCIE

NVLINKED = {"B200": NVLINK4, "H200": NVLINK4, "H100 SXM": NVLINK4, "A100 80GB": NVLINK3, "A100 40GB": NVLINK3, "V100 32GB": NVLINK3}
SAME = {"A100 80GB": "a100-80gb", "A100 40GB": "a100-40gb", "H100 SXM": "h100-80gb", "H200": "h200-141gb", "RTX A6000": "a6000-48gb"}


def hardware_of(device: Device) -> Hardware:
    """What the time model knows of a device: NVLink inside a node for the cards that come with it, PCIe for the others."""
    name = device.name.partition(" (as ")[2].rstrip(")") or device.name
    if name in SAME:
        return named(SAME[name])
    chip = Chip(name, device.flops, device.bandwidth, device.memory, asynchronous=device.gpu)
    return Hardware(chip, NVLINKED.get(name, PCIE), Efficiency(gemm=0.605) if name == "B200" else Efficiency())


@functools.lru_cache(maxsize=16)
def _counted(config_text: str, config_class: Any, rank: int | None, targets: str, scores: bool) -> tuple[int, int, int]:
    """(parameters, trained ones, those of an input embedding of its own) of a model on the meta device."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    from configs.schema import Lora

    config = config_class.from_dict(json.loads(config_text) | ({"num_labels": 1, "pad_token_id": 0} if scores else {}))
    with torch.device("meta"):
        model = (AutoModelForSequenceClassification if scores else AutoModelForCausalLM).from_config(config, dtype=torch.bfloat16)
    total = sum(p.numel() for p in model.parameters())
    embedding = model.get_input_embeddings().weight
    output = None if scores else model.get_output_embeddings()
    lookup = 0 if output is not None and output.weight is embedding else embedding.numel()
    if rank is None:
        return total, total, lookup
    return total, _adapter_size(model, Lora(rank=rank, target_modules=json.loads(targets))), lookup


def _adapter_size(model: Any, lora: Any) -> int:
    """Parameters of low-rank adapters, without making them: rank x (inputs + outputs) of each layer that gets one."""
    import re

    from torch import nn

    wanted, head = lora.target_modules, getattr(model, "get_output_embeddings", lambda: None)()

    def chosen(name: str) -> bool:
        if wanted == "all-linear":
            return True
        return bool(re.fullmatch(wanted, name)) if isinstance(wanted, str) else any(name == t or name.endswith(f".{t}") for t in wanted)

    layers = [m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head and not n.endswith("score") and chosen(n)]
    return sum(lora.rank * (layer.in_features + layer.out_features) for layer in layers)


def shape_of(config: Any, lora: Any = None, *, scores: bool = False, frozen: bool = False) -> ModelShape:
    """The shape of a model, as the time model wants it."""
    text = config.get_text_config()
    kind: Any = type(config)
    counts = _counted(json.dumps(config.to_dict(), default=str, sort_keys=True), kind, lora.rank if lora else None, json.dumps(lora.target_modules) if lora else "null", scores)
    heads = text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    shape = ModelShape(counts[0], counts[1], text.num_hidden_layers, text.hidden_size, 2 * kv_heads * size, 0 if scores else text.vocab_size, counts[2])
    return shape.frozen() if frozen else shape


def facts_of(work: Work, layout: Layout) -> PlanFacts:
    """What the time of a stage depends on."""
    job, cfg, stage = work.job, work.cfg, work.stage
    width = 2 if job.bf16 else 4
    common: dict[str, Any] = {
        "stage": stage, "policy": shape_of(job.config, job.lora, scores=stage == "reward"), "steps": work.steps or 1, "micro_batch": job.sequences,
        "zero": 3 if layout.fsdp else layout.zero, "checkpointing": job.checkpointing, "weight_bytes": width, "gradient_bytes": width if layout.zero else 4,
    }  # fmt: skip
    frozen = shape_of(job.config, frozen=True)
    if stage != "ppo":
        rows = cfg.train.batch_size * (2 if stage != "sft" else 1)
        return PlanFacts(**common, rows=rows, tokens=max(1, round(work.rows.mean)), reference=frozen if stage == "dpo" else None)
    rewards = [shape_of(config, scores=True, frozen=True) for config in job.reward_models]
    rewards += [shape_of(job.config, scores=True, frozen=True)] * len(job.reward_adapters)
    value = {"copy": shape_of(job.config, scores=True), "adapter": shape_of(job.config, job.lora, scores=True), "head": None}[job.value_function]
    return PlanFacts(
        **common, rows=cfg.train.rollout_batch_size, tokens=max(1, round(work.rows.mean)), new_tokens=job.completion_tokens, reference=frozen, value=value,
        rewards=tuple(rewards), epochs=cfg.train.num_ppo_epochs, minibatches=cfg.train.num_minibatches, generate_batch=job.generate_batch,
        gather_once=job.gathers_once,
    )  # fmt: skip
