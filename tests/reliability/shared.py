"""How much a checkpoint shares with its parents, measured on the disk: models that were trained, published and published again."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

from stages import models
from stages.registry import Checkpoint, Parent, Registry
from tests.tiny import tiny_config, tiny_tokenizer

EOS = [258]


def publish(registry: Registry, family: str, model: Any, parents: list[Parent], info: dict[str, Any] | None = None, **extra: Any) -> Checkpoint:
    """What the stages do with a model, less their records."""
    stage, name = family.split("/")
    return registry.publish(stage, name, lambda to: models.save_model(model, tiny_tokenizer(), to, eos_ids=EOS, **extra), parents=parents, info=info)


def origin(registry: Registry, checkpoint: Checkpoint) -> models.Origin:
    return models.Origin(checkpoint.ref, checkpoint, registry)


def base(registry: Registry, seed: int = 0, dtype: torch.dtype = torch.float32, **shape: Any) -> Checkpoint:
    """A random Llama as sft/base."""
    torch.manual_seed(seed)
    return publish(registry, "sft/base", LlamaForCausalLM(tiny_config(**shape)).to(dtype), [])


def step(model: Any, trained: Any) -> None:
    """One optimizer step on random tokens that changes every parameter for which trained(name) is true, and no other."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained(name))
    tokens = torch.randint(0, 256, (2, 16))
    model(input_ids=tokens, labels=tokens).loss.backward()
    torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2).step()


def frozen(registry: Registry, parent: Checkpoint, trained_layers: tuple[int, ...]) -> Checkpoint:
    """A child of which only some layers were trained."""
    model = models.load_policy(origin(registry, parent), dtype=torch.float32)
    step(model, lambda name: any(f"layers.{layer}." in name for layer in trained_layers))
    return publish(registry, "sft/frozen", model, [Parent.of(parent, "init_from")], like=origin(registry, parent))


def merged(registry: Registry, parent: Checkpoint, targets: list[str]) -> tuple[Checkpoint, Checkpoint]:
    """A LoRA adapter on `targets` that was trained for a step, and the whole weights that come of merging it, written as by a stage that starts from it."""
    from peft import LoraConfig, get_peft_model

    under = origin(registry, parent)
    model = get_peft_model(models.load_policy(under), LoraConfig(r=8, target_modules=targets, task_type="CAUSAL_LM"))
    step(model, lambda name: "lora_" in name)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    facts = {"stage_info": {"adapter": models.adapter_facts(under) | {"vocabulary": 259}}}
    adapter = publish(registry, "sft/adapter", model, [Parent.of(parent, "base")], facts, base=under)
    whole = models.load_policy(origin(registry, adapter))
    return adapter, publish(registry, "ppo/merged", whole, [Parent.of(adapter, "init_from"), Parent.of(parent, "base")], like=origin(registry, adapter))


def shared_with(checkpoint: Checkpoint, parent: Checkpoint) -> float:
    """Share of a checkpoint's bytes (all its files) that lie in files which its parent holds too."""
    return _same_bytes(checkpoint, parent) / checkpoint.size


def taken_over(checkpoint: Checkpoint, parent: Checkpoint) -> float:
    """Share of the parent's bytes (all its files) that lie in files which a checkpoint holds too: what was trained has more bytes than it had where the
    parent is in 16 bits."""
    return _same_bytes(checkpoint, parent) / parent.size


def _same_bytes(checkpoint: Checkpoint, parent: Checkpoint) -> int:
    theirs = {(status.st_dev, status.st_ino) for status in map(os.stat, _files(parent))}
    origins = {f"{parent.id}/{name}" for name in parent.manifest["files"]} | {entry.get("reflink_of") for entry in parent.manifest["files"].values()} - {None}
    same = 0
    for name, entry in checkpoint.manifest["files"].items():
        status = os.stat(checkpoint.path / name)
        same += entry["size"] * ((status.st_dev, status.st_ino) in theirs or entry.get("reflink_of") in origins)
    return same


def _files(checkpoint: Checkpoint) -> list[Path]:
    return [checkpoint.path / name for name in checkpoint.manifest["files"]]


def llama_tensors(hidden: int, feed: int, kv: int, layers: int, vocabulary: int, tied: bool) -> dict[str, int]:
    """Tensor -> bytes of a Llama in 16 bits."""
    inner = {
        "self_attn.q_proj": hidden * hidden, "self_attn.k_proj": hidden * kv, "self_attn.v_proj": hidden * kv, "self_attn.o_proj": hidden * hidden,
        "mlp.gate_proj": hidden * feed, "mlp.up_proj": hidden * feed, "mlp.down_proj": hidden * feed, "input_layernorm": hidden, "post_attention_layernorm": hidden,
    }  # fmt: skip
    sizes = {f"model.layers.{layer}.{name}.weight": 2 * count for layer in range(layers) for name, count in inner.items()}
    return sizes | {"model.embed_tokens.weight": 2 * hidden * vocabulary, "model.norm.weight": 2 * hidden} | ({} if tied else {"lm_head.weight": 2 * hidden * vocabulary})
