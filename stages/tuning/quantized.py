"""A frozen base in 4 bits under adapters (QLoRA, Dettmers et al. 2023, arXiv:2305.14314)."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from configs.errors import UserError
from configs.schema import TRLStage, lora_of


def is_quantized(layer: nn.Module) -> bool:
    """Whether a layer's weight is packed: its dtype is storage then, and must not be cast."""
    weight = getattr(layer, "weight", None)
    return weight is not None and not weight.is_floating_point()


def is_packed(model: Any) -> bool:
    """Whether `quantize` has replaced layers of a model."""
    return any(getattr(part, "is_loaded_in_4bit", False) for part in (model, getattr(model, "base_model", None)))


def quantize(model: Any, device: torch.device, compute_dtype: torch.dtype) -> None:
    """Replace the linear layers of `model`, but a language or score head, by NF4 ones on `device`: about 0.52 bytes a weight, one layer at a time.

    Matrix products are computed in `compute_dtype`. Call it before adapters are added: peft looks at the layers it wraps.

    Raises:
        UserError: a model without linear layers (GPT-2 has layers of its own kind).
    """
    from bitsandbytes.nn import Linear4bit, Params4bit

    heads = (model.get_output_embeddings(), getattr(model, "score", None))
    names = [name for name, module in model.named_modules() if type(module) is nn.Linear and not any(module is head for head in heads)]
    if not names:
        raise UserError(f"quantization: {type(model).__name__} has no linear layers that could be quantised; leave `quantization` out")
    for name in names:
        old = model.get_submodule(name)
        new = Linear4bit(old.in_features, old.out_features, bias=old.bias is not None, compute_dtype=compute_dtype, quant_type="nf4", device="meta")
        weight = old.weight.detach().to(compute_dtype)  # what it is unpacked to again, before each product
        new.weight = Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=True, module=new)
        if old.bias is not None:
            new.bias = nn.Parameter(old.bias.detach(), requires_grad=False)
        model.set_submodule(name, new.to(device))  # bitsandbytes packs a weight when it is moved
    model.is_loaded_in_4bit = True  # where peft looks


def pack(model: Any, cfg: TRLStage, *, bf16: bool) -> None:
    """Quantise a stage's model where its config says so, on this process's GPU."""
    lora = lora_of(cfg)
    if lora is not None and lora.quantization is not None:
        quantize(model, torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))), torch.bfloat16 if bf16 else torch.float32)
