"""Small adapters in a registry, made by hand: tests of what is done with several of them train nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from stages import models
from stages.registry import Checkpoint, Parent, Registry
from stages.tokens import load_tokens
from tests.tiny import tiny_model


def world(folder: Path, **changes: Any) -> tuple[Registry, str]:
    """A registry, and a random base in a folder."""
    return Registry(folder / "registry"), str(tiny_model(folder / "base", **({"initializer_range": 0.3, "hidden": 16} | changes)))


def publish_whole(registry: Registry, family: str, source: str, **info: Any) -> Checkpoint:
    """A folder's model as a checkpoint."""
    stage, name = family.split("/")
    origin = models.find(source, registry.root)
    tokens, model = load_tokens(origin), models.load_policy(origin)
    return registry.publish(
        stage, name, lambda to: models.save_model(model, tokens.tokenizer, to, eos_ids=tokens.eos_ids), info={"tokenizer": tokens.facts, "stage_info": {}, **info}
    )


def publish_adapter(registry: Registry, family: str, base: str, *, seed: int = 1, config: Any = None, **settings: Any) -> Checkpoint:
    """An adapter with random values on `base` (a folder or a reference). `settings` are LoraConfig's; `config` is another kind's."""
    from peft import LoraConfig, get_peft_model

    stage, name = family.split("/")
    origin = models.find(base, registry.root)
    tokens, model = load_tokens(origin), models.load_policy(origin)
    config = config or LoraConfig(**({"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | settings))
    torch.manual_seed(seed)
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for parameter in (one for one in adapted.parameters() if one.requires_grad):
            parameter += 0.3 * torch.randn_like(parameter)
    facts = models.adapter_facts(origin) | {"vocabulary": model.get_input_embeddings().weight.shape[0]}
    return registry.publish(
        stage, name, lambda to: models.save_model(adapted, tokens.tokenizer, to, eos_ids=tokens.eos_ids, base=origin),
        parents=[origin.parent("init_from")] if origin.checkpoint is None else [Parent.of(origin.checkpoint, "init_from")],
        info={"tokenizer": tokens.facts, "stage_info": {"adapter": facts}, "metrics": {"loss": 1.5}},
    )  # fmt: skip


def updates(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Layer -> scaling · B · A of a LoRA checkpoint, from its files alone, in float64."""
    from safetensors.torch import load_file

    from stages.adapters.facts import adapter_facts

    config, tensors = adapter_facts(checkpoint.model_dir).config, load_file(checkpoint.model_dir / "adapter_model.safetensors")
    scaling = config["lora_alpha"] / (config["r"] ** (0.5 if config["use_rslora"] else 1))
    return {
        name.removesuffix(".lora_A.weight"): scaling * tensors[name.replace("lora_A", "lora_B")].double() @ tensors[name].double()
        for name in tensors if name.endswith(".lora_A.weight")
    }  # fmt: skip


def logits(model: Any, ids: tuple[int, ...] = (5, 60, 70, 80, 90)) -> torch.Tensor:
    """What a model says to a few tokens, [T, V]."""
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].float()
