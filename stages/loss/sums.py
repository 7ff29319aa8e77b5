"""Sums of the loss over tokens, each with a weight, chunk by chunk: no [tokens, vocabulary] tensor lives, neither forward nor backward.

A chunk's logits give its loss and, while they are at hand, the gradients of the loss for its hidden states and for the head. What is kept
is [N, d] and, where the head is trained, one [V, d]; the backward pass multiplies both by the one number that comes down to a sum. That
is three matrix products for a token, where logits that are computed again in the backward pass make it four.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from stages.loss import logprobs
from stages.loss.logprobs import choose
from stages.onednn import add_weight_gradient, at_most, faster, linear, product, whole

SMALL_VOCABULARY = 2**14


class TokenSums(NamedTuple):
    """Sums over the tokens that count, each [] in float64 on their device."""

    loss: Tensor  # nats, each token's times its weight, with a gradient
    correct: Tensor  # tokens with the highest logit; of equal ones the first has it
    entropy: Tensor  # nats, of the next-token distributions
    counted: Tensor  # tokens
    apart: Tensor | None = None  # [2, 4]: the same four without weights and gradient, of tokens that are not marked and of those that are; None: no marks


class Weighting(NamedTuple):
    """What each of N tokens' loss is multiplied by, and which of them have sums of their own."""

    weights: Tensor  # [N] float
    marks: Tensor  # [N] bool


class Read(NamedTuple):
    """What the logits of a chunk say about its tokens; [n] but for the last."""

    loss: Tensor  # nats
    correct: Tensor  # bool
    entropy: Tensor  # nats
    gradient: Tensor  # [n, V], of the loss with respect to the logits


def read(logits: Tensor, ids: Tensor, smoothing: float = 0.0) -> Read:
    """Cross-entropy of `ids` [n] under `logits` [n, V].

    With `smoothing` s the target is (1 - s) one-hot + s / V (Szegedy et al. 2016, arXiv:1512.00567), as in F.cross_entropy.
    """
    found = choose(logits, ids, entropy=True)
    loss, gradient, index = -found.logprobs, found.probabilities, ids.unsqueeze(1)
    if smoothing:
        normaliser = logits.gather(1, index).squeeze(1) - found.logprobs
        loss = (1 - smoothing) * loss + smoothing * (normaliser - logits.mean(dim=1))
        gradient -= smoothing / logits.shape[1]
    gradient.scatter_add_(1, index, gradient.new_full(index.shape, smoothing - 1.0))
    assert found.entropy is not None
    return Read(loss, logits.argmax(dim=1) == ids, found.entropy, gradient)


def rows_of_chunk(vocabulary: int, device: torch.device) -> int:
    """Tokens whose logits are as many as one chunk should hold."""
    rows = max(1, (logprobs.CHUNK_ELEMENTS_GPU if device.type == "cuda" else logprobs.CHUNK_ELEMENTS) // vocabulary)
    if device.type == "cpu" and vocabulary < SMALL_VOCABULARY:
        rows = min(rows, 128)  # as fast, and the chunk is not what a small model's memory goes into
    return at_most(rows) if faster() and device.type == "cpu" else rows


def linear_sums(
    states: Tensor, ids: Tensor, head: nn.Linear, *, scale: float = 1.0, cap: float | None = None, rows: int | None = None, smoothing: float = 0.0,
    weighting: Weighting | None = None,
) -> TokenSums:  # fmt: skip
    """Sums for `ids` [N] that hidden states [N, d] should predict, under cap * tanh(scale * head(states) / cap).

    The product with the head is in its dtype (under autocast in that of autocast), everything after it in float32 or float64. `rows`:
    tokens of a chunk. Gradients go to the states and to what of the head is trained. `weighting`: None is a weight of 1 for all.
    """
    rows = rows or rows_of_chunk(head.weight.shape[0], states.device)
    loss, each = _LinearSums.apply(states, head.weight, head.bias, ids, scale, cap, rows, smoothing, _weights(weighting), torch.is_grad_enabled())
    return _summed(loss, each, weighting)


def module_sums(
    states: Tensor, ids: Tensor, logits_of: Callable[[Tensor], Tensor], trained: list[Tensor], *, rows: int, smoothing: float = 0.0,
    weighting: Weighting | None = None,
) -> TokenSums:  # fmt: skip
    """The same under any head: `logits_of` gives logits [n, V] of states [n, d], and `trained` are the parameters in it that are trained."""
    loss, each = _ModuleSums.apply(states, ids, logits_of, rows, smoothing, _weights(weighting), torch.is_grad_enabled(), *trained)
    return _summed(loss, each, weighting)


def whole_sums(logits: Tensor, ids: Tensor, smoothing: float = 0.0, weighting: Weighting | None = None) -> TokenSums:
    """The same from logits [N, V] that are there, by autograd."""
    logits = _precise(logits)
    losses = F.cross_entropy(logits, ids, reduction="none", label_smoothing=smoothing)
    with torch.no_grad():
        chosen = torch.log_softmax(logits, dim=1)
        each = _each(logits, len(ids))
        for place, value in enumerate((losses, logits.argmax(dim=1) == ids, -(chosen.exp() * chosen).sum(dim=1))):
            each[place] = value
    losses = losses.to(each.dtype)
    return _summed((losses if weighting is None else losses * weighting.weights).sum(), each, weighting)


def _weights(weighting: Weighting | None) -> Tensor | None:
    return None if weighting is None else weighting.weights


def _summed(loss: Tensor, each: Tensor, weighting: Weighting | None) -> TokenSums:
    """`each`: [3, N], what every token has, as in Read."""
    counted = loss.new_full((), each.shape[1])
    if weighting is None:
        return TokenSums(loss, each[1].sum(), each[2].sum(), counted)
    kinds = torch.stack([~weighting.marks, weighting.marks], dim=1).to(each.dtype)  # [N, 2]
    with torch.no_grad():
        apart = (torch.cat([each, torch.ones_like(each[:1])]) @ kinds).t()
    return TokenSums(loss, each[1].sum(), each[2].sum(), counted, apart)


def _precise(logits: Tensor) -> Tensor:
    """Logits in float32, or in float64 where they are."""
    return logits if logits.dtype in (torch.float32, torch.float64) else logits.float()


def _each(states: Tensor, count: int) -> Tensor:
    """Room for what `count` tokens have, [3, count], in float64 where the device has it: sums of many are not rounded."""
    return torch.empty(3, count, dtype=torch.float32 if states.device.type == "mps" else torch.float64, device=states.device)


def _keep(each: Tensor, found: Read) -> None:
    """Write down what a chunk's tokens have; padding after them is left out."""
    for place, value in enumerate((found.loss, found.correct, found.entropy)):
        each[place] = value[: each.shape[1]]


def _outputs(ctx: Any, each: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    ctx.mark_non_differentiable(each)
    return (each[0] if weights is None else each[0] * weights).sum(), each


def _like(gradient: Tensor | None, tensor: Tensor | None) -> Tensor | None:
    return gradient if gradient is None or tensor is None else gradient.to(tensor.dtype)


class _LinearSums(torch.autograd.Function):
    """(weighted loss [], what each token has [3, N]) under a linear head."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, scale: float, cap: float | None, rows: int, smoothing: float,
        weights: Tensor | None, learns: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """What each token has, and gradients, chunk by chunk."""
        device = states.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        used, shift = weight.to(dtype), bias.to(dtype) if bias is not None else None
        wanted = [learns and needed for needed in ctx.needs_input_grad[:3]]
        to_states = torch.empty_like(states) if wanted[0] else None
        to_weight, to_bias = (torch.zeros_like(t, dtype=_accumulated(t.dtype)) if t is not None and want else None for t, want in zip((weight, bias), wanted[1:], strict=True))
        each = _each(states, len(ids))
        with torch.autocast(device, enabled=False):
            for start in range(0, len(ids), rows):
                span = slice(start, min(start + rows, len(ids)))
                part, chosen = _padded(states[span].to(dtype), ids[span])
                real = span.stop - start
                logits = _precise(linear(part, used, shift))
                logits = logits.mul_(scale) if scale != 1.0 else logits
                logits = logits.div_(cap).tanh_().mul_(cap) if cap is not None else logits
                found = read(logits, chosen, smoothing)
                _keep(each[:, span], found)
                if any(wanted):
                    gradient = _through(found.gradient, logits, scale, cap, real)
                    if weights is not None:
                        gradient[:real].mul_(weights[span].unsqueeze(1))
                    _spread(gradient, part, used, None if to_states is None else to_states[span], to_weight, to_bias)
                del logits, found
        ctx.gradients = (to_states, _like(to_weight, weight), _like(to_bias, bias))
        return _outputs(ctx, each, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        """The gradients that are there, times the one of the sum."""
        gradients, ctx.gradients = ctx.gradients, None
        return *(None if found is None else found.mul_(grad) for found in gradients), None, None, None, None, None, None, None


def _padded(states: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """A chunk with a few rows of zeros after it, where oneDNN may be taken and has a program for so many rows only."""
    extra = whole(len(ids)) - len(ids) if faster() and states.dtype is torch.float32 and states.device.type == "cpu" else 0
    return (F.pad(states, (0, 0, 0, extra)), F.pad(ids, (0, extra))) if extra else (states, ids)


def _through(gradient: Tensor, logits: Tensor, scale: float, cap: float | None, real: int) -> Tensor:
    """From the gradient for the logits [n, V] to the one for the head's output, in place; rows from `real` on do not count."""
    if cap is not None:
        gradient.mul_(logits.div_(cap).square_().neg_().add_(1.0))
    if scale != 1.0:
        gradient.mul_(scale)
    gradient[real:] = 0.0
    return gradient


def _spread(gradient: Tensor, states: Tensor, weight: Tensor, to_states: Tensor | None, to_weight: Tensor | None, to_bias: Tensor | None) -> None:
    """Put what a chunk's gradient [n, V] means for its states into `to_states`, and add what it means for the head."""
    rounded = gradient.to(weight.dtype)
    if to_states is not None:
        to_states.copy_(product(rounded, weight.t())[: len(to_states)])
    if to_weight is not None:
        if to_weight.dtype == states.dtype:
            add_weight_gradient(to_weight, states, rounded)
        elif to_weight.device.type == "cuda":
            torch.addmm(to_weight, rounded.t(), states, out_dtype=torch.float32, out=to_weight)
        else:
            to_weight.addmm_(gradient.t(), states.float())
    if to_bias is not None:
        to_bias += gradient.sum(dim=0)


def _accumulated(dtype: torch.dtype) -> torch.dtype:
    """What gradients of many chunks are added up in: rounding each sum to bf16 would lose what small ones add."""
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32


class _ModuleSums(torch.autograd.Function):
    """The same under any head, whose gradients autograd finds, a chunk at a time."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, ids: Tensor, logits_of: Callable[[Tensor], Tensor], rows: int, smoothing: float, weights: Tensor | None, learns: bool, *trained: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What each token has, and gradients, chunk by chunk."""
        learns = learns and any(ctx.needs_input_grad)
        to_states = torch.empty_like(states) if learns else None
        to_trained = [torch.zeros_like(t, dtype=_accumulated(t.dtype)) if learns else None for t in trained]
        each = _each(states, len(ids))
        for start in range(0, len(ids), rows):
            span = slice(start, start + rows)
            with torch.set_grad_enabled(learns):
                part = states[span].detach().requires_grad_(learns)
                logits = _precise(logits_of(part))
            found = read(logits.detach(), ids[span], smoothing)
            _keep(each[:, span], found)
            if to_states is not None:
                if weights is not None:
                    found.gradient.mul_(weights[span].unsqueeze(1))
                first, *others = torch.autograd.grad(logits, [part, *trained], found.gradient, allow_unused=True)
                to_states[span] = first
                for total, gradient in zip(to_trained, others, strict=True):
                    if gradient is not None and total is not None:
                        total += gradient
            del logits, found
        ctx.gradients = (to_states, *(_like(total, t) for total, t in zip(to_trained, trained, strict=True)))
        return _outputs(ctx, each, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        """The gradients that are there, times the one of the sum."""
        (to_states, *to_trained), ctx.gradients = ctx.gradients, None
        return to_states.mul_(grad), None, None, None, None, None, None, *(None if found is None else found.mul_(grad) for found in to_trained)
