"""The shared backbone in 4 bits under its adapters (QLoRA, Dettmers et al. 2023, arXiv:2305.14314).

Frozen linear layers but the output head are kept as NF4; adapters, heads, embeddings and norms stay in float32. Policy and reference
round alike, as they are the same weights: KL still starts at 0. A reward adapter in place reads the rounded weights too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from configs.errors import UserError
from configs.extras import need
from configs.schema import PPOStage


def check(cfg: PPOStage, device: torch.device) -> None:
    """Whether this machine can do what `quantization` asks, before anything is loaded.

    Raises:
        UserError: no GPU (MissingExtra: no bitsandbytes).
    """
    if cfg.quantization is None:
        return
    if device.type != "cuda":
        raise UserError(f"quantization: {cfg.quantization} needs an NVIDIA GPU and this run is on {device.type}; leave `quantization` out")
    need("bitsandbytes", f"quantization: {cfg.quantization}", "quantization")


def is_quantized(layer: nn.Module) -> bool:
    """Whether a layer's weight is packed: its dtype is storage then, and must not be cast."""
    weight = getattr(layer, "weight", None)
    return weight is not None and not weight.is_floating_point()


def quantize(model: Any, device: torch.device, compute_dtype: torch.dtype) -> None:
    """Replace the linear layers of `model`, but the output head, by NF4 ones on `device`: about 0.52 bytes a weight, one layer at a time.

    Matrix products are computed in `compute_dtype`. Call it before adapters are added: peft looks at the layers it wraps.

    Raises:
        UserError: a model without linear layers (GPT-2 has layers of its own kind).
    """
    from bitsandbytes.nn import Linear4bit, Params4bit

    head = model.get_output_embeddings()
    names = [name for name, module in model.named_modules() if type(module) is nn.Linear and module is not head]
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
