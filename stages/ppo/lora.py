"""LoRA layers as one product: the adapter is added to the weight for the time of a call.

peft computes x W' + s (x A') B': two thin products and three more passes over the output in a forward pass, as many again in the
backward pass, and their results in memory. Over many tokens it is cheaper to form W + s B A, which costs as much as a few tokens
do, and to drop it after the product; the gradients of A and B need thin products only. Nothing is written into the base weight.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from stages.onednn import OneDNNLinear, linear, product, weight_gradient


class SummedLinear(Linear):
    """peft's LoRA layer over a plain linear layer, with the sum formed where there are tokens enough for it to pay."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[..., in] -> [..., out]."""
        adapter = None if args or kwargs or self.disable_adapters or self.merged else self._only()
        if adapter is None:
            return super().forward(x, *args, **kwargs)
        base: Any = self.base_layer
        a, b = (cast(Tensor, part[adapter].weight) for part in (self.lora_A, self.lora_B))
        if not pays(x, base.weight, a):
            return super().forward(x)
        return _Sum.apply(x, base.weight, base.bias, a, b, self.scaling[adapter])

    def _only(self) -> str | None:
        """The one active adapter, where it is plain: without dropout, bias or a variant of LoRA."""
        active = self.active_adapters
        if len(active) != 1 or active[0] not in self.lora_A or active[0] in self.lora_variant or self.lora_bias[active[0]]:
            return None
        return active[0] if isinstance(self.lora_dropout[active[0]], nn.Identity) else None


def pays(x: Tensor, weight: Tensor, a: Tensor) -> bool:
    """Whether the sum costs less than what it saves: a function of shapes and types. In bf16 it would round the adapter away."""
    if not x.dtype is weight.dtype is a.dtype is torch.float32 or torch.is_autocast_enabled(x.device.type):
        return False
    tokens = x.numel() // x.shape[-1]
    return tokens * sum(weight.shape) > 2 * weight.numel()


def use_sums(model: nn.Module) -> None:
    """Let every plain LoRA layer of the model compute so; nothing that is saved or named changes."""
    for module in model.modules():
        if type(module) is Linear and type(module.base_layer) in (nn.Linear, OneDNNLinear) and not module.fan_in_fan_out:
            module.__class__ = SummedLinear


class _Sum(torch.autograd.Function):
    """x (W + s B A)' + bias under a frozen W and bias."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        """x [..., K], W [M, K], A [r, K], B [M, r] -> [..., M]."""
        assert not any(ctx.needs_input_grad[1:3]), "the base under an adapter is frozen"
        ctx.save_for_backward(x if any(ctx.needs_input_grad[3:5]) else None, weight, a, b)
        ctx.scale = scale
        return linear(x, torch.addmm(weight, b, a, alpha=scale), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, A and B."""
        x, weight, a, b = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        to_x = to_a = to_b = None
        if ctx.needs_input_grad[0]:
            to_x = product(flat, torch.addmm(weight, b, a, alpha=ctx.scale).t()).view(*grad.shape[:-1], -1)
        if x is not None:
            rows = x.reshape(-1, x.shape[-1])
            to_a = weight_gradient(rows, product(flat, b.t())).mul_(ctx.scale)
            to_b = weight_gradient(product(rows, a), flat).mul_(ctx.scale)
        return to_x, None, None, to_a, to_b, None
