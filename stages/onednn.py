"""Linear layers in float32 through oneDNN, on CPUs where that is the faster of the two libraries that torch carries.

On a CPU torch multiplies float32 matrices with MKL, which uses AVX-512 on Intel's processors alone: on an AMD EPYC (Zen 5) it reached
100 GFLOP/s a core and oneDNN 220, with the same IEEE float32 arithmetic in another order. oneDNN makes and keeps a program of about
0.4 MiB for every shape it meets, at about 1 ms each, so only shapes of few sizes go there: who calls pads to `whole` rows. A product
of few multiplications stays with MKL: what oneDNN takes for each call is then more than it saves (1.7 times as fast at 64 x 256 x 256, half
as fast at 64 x 64 x 64), and the programs of many small shapes would be most of what a small model takes.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

STEPS = 16  # sizes between a power of two and the next one that have a program
LEAST = 8  # rows; fewer are no faster
LEAST_WORK = 2**22  # multiplications of one product; from a million on oneDNN is faster at all, from here on by half
LEAST_GRADIENT_WORK = 2**25  # of a weight's gradient, of which a factor has to be copied first


def whole(rows: int) -> int:
    """The next number of rows, from `rows` on, that has a program: a multiple of 8 and of a sixteenth of the power of two below; at most 1/16 more, or 7."""
    step = max(LEAST, (1 << max(rows, 1).bit_length() - 1) // STEPS)
    return -(-rows // step) * step


def at_most(rows: int) -> int:
    """The greatest number of rows, up to `rows`, that has a program, or `rows` where none is that small."""
    return next((n for n in range(rows, LEAST - 1, -1) if whole(n) == n), rows)


def widened(rows: int, model: nn.Module) -> int:
    """`whole(rows)` for a model of layers that take oneDNN where the product is large enough; for others `rows`: padding would cost and bring nothing."""
    return whole(rows) if faster() and any(isinstance(module, OneDNNLinear) for module in model.modules()) else rows


@functools.cache
def faster() -> bool:
    """Whether this machine's CPU is one on which oneDNN is faster, as far as its name says: a run that is resumed must find the same."""
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512" or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    facts = Path("/proc/cpuinfo")
    return facts.exists() and "AuthenticAMD" in facts.read_text()


def product(rows: Tensor, weight: Tensor) -> Tensor:
    """rows [N, K] times weight [M, K] transposed: [N, M]. No gradient."""
    if _suited(rows, weight, weight.shape[0], LEAST_WORK):
        return _multiply(rows, weight, None)
    return rows @ weight.t()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """What F.linear gives, with gradients for all three: x [..., K], weight [M, K], bias [M]."""
    if not _suited(x, weight, weight.shape[0], LEAST_WORK):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        return _Linear.apply(x, weight, bias)
    return _multiply(x, weight, bias)


def _suited(x: Tensor, other: Tensor, columns: int, least: int) -> bool:
    """Of a product of all elements of `x` [..., K], each taken `columns` times, at least `least` multiplications in all. A function of shapes, types and machine alone: the same call takes the same way in every run."""
    if x.dtype is not torch.float32 or other.dtype is not torch.float32 or x.device.type != "cpu" or torch.is_autocast_enabled("cpu") or not faster():
        return False
    rows = x.numel() // x.shape[-1]
    return rows >= LEAST and rows == whole(rows) and x.numel() * columns >= least


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    """A linear layer whose three products are oneDNN's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """[..., K] -> [..., M]."""
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return _multiply(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, weight and bias, each where it is asked for."""
        x, weight = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        to_x = _multiply(grad, weight.t(), None) if ctx.needs_input_grad[0] else None
        to_weight = weight_gradient(x.reshape(-1, x.shape[-1]), flat) if x is not None else None
        return to_x, to_weight, flat.sum(dim=0) if ctx.needs_input_grad[2] else None


def weight_gradient(rows: Tensor, grad: Tensor) -> Tensor:
    """grad [N, M] transposed times rows [N, K]: [M, K]."""
    if not _suited(rows, grad, grad.shape[1], LEAST_GRADIENT_WORK):
        return grad.t() @ rows
    # oneDNN takes its first factor contiguous, and both are transposed: what is copied is the narrower one.
    if rows.shape[1] < grad.shape[1]:
        return _multiply(rows.t(), grad.t(), None).t()
    return _multiply(grad.t(), rows.t(), None)


def add_weight_gradient(total: Tensor, rows: Tensor, grad: Tensor) -> None:
    """Add `weight_gradient(rows, grad)` to `total` [M, K], in place."""
    if _suited(rows, grad, grad.shape[1], LEAST_GRADIENT_WORK):
        total += weight_gradient(rows, grad)
    else:
        total.addmm_(grad.t(), rows)


class OneDNNLinear(nn.Linear):
    """nn.Linear that takes oneDNN where it can."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return linear(input, self.weight, self.bias)


def use_onednn(*models: nn.Module | None) -> None:
    """Let every plain linear layer of the models compute so, where it is faster; nothing that is saved or named changes."""
    for model in models if faster() else ():
        for module in model.modules() if model is not None else ():
            if type(module) is nn.Linear and module.weight.dtype is torch.float32 and module.weight.device.type == "cpu":
                module.__class__ = OneDNNLinear
