"""Log-probs of chosen tokens from hidden states, in chunks, with a gradient that keeps few logits or none.

d logprob / d logits is one-hot minus softmax. Under a frozen head the direction (one-hot - softmax) W of each token's gradient is
known in the forward pass: [N, d] is kept and nothing is computed twice. A head that is trained needs the softmax itself again: it
is kept where all of a micro-batch is small, and otherwise recomputed from the hidden states, chunk by chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from stages.onednn import OneDNNLinear, add_weight_gradient, at_most, product, whole

# Logits of one chunk, of which two are alive at once. Fewer make slow matrix products; of 32 MiB or more glibc would ask the kernel
# for fresh pages each time, which costs more than reading them.
CHUNK_ELEMENTS = 7 * 2**20
CHUNK_ELEMENTS_GPU = 2**24
KEPT_ELEMENTS = 2**25  # probabilities of one micro-batch, kept for the gradient of a trained head: 128 MiB in float32


class Chosen(NamedTuple):
    """What logits say about the tokens that were chosen, both [N], in nats, and softmax(logits) [N, V]."""

    logprobs: Tensor
    entropy: Tensor | None
    probabilities: Tensor


def chunk_rows(head: Any) -> int:
    """Hidden states whose logits fit one chunk."""
    elements = CHUNK_ELEMENTS_GPU if head.weight.device.type == "cuda" else CHUNK_ELEMENTS
    rows = max(1, elements // head.weight.shape[0])
    return at_most(rows) if isinstance(head, OneDNNLinear) else rows


def pad_last_chunk(head: Any, states: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """States [N, d] and ids [N] with a few of zero after them, where oneDNN takes a chunk of so many rows only."""
    extra = whole(rest) - rest if isinstance(head, OneDNNLinear) and (rest := len(ids) % chunk_rows(head)) else 0
    return (F.pad(states, (0, 0, 0, extra)), F.pad(ids, (0, extra))) if extra else (states, ids)


def choose(logits: Tensor, ids: Tensor, *, entropy: bool = False) -> Chosen:
    """Read logits [N, V] in float32."""
    probabilities = torch.softmax(logits, dim=1)
    # Log-sum-exp from what there is: the largest probability is exp(largest logit) over that sum.
    normaliser = logits.amax(dim=1) - probabilities.amax(dim=1).log()
    chosen = logits.gather(1, ids.unsqueeze(1)).squeeze(1) - normaliser
    return Chosen(chosen, normaliser - torch.linalg.vecdot(probabilities, logits) if entropy else None, probabilities)


def chosen_logprobs(head: nn.Linear, states: Tensor, ids: Tensor, logits_of: Callable[[Tensor], Tensor], factor: float) -> Tensor:
    """Log-probs [N] of `ids` [N], in nats, with gradients for `states` [N, d] and for what of `head` is trained.

    `logits_of` gives fresh float32 logits of hidden states: `factor` times what `head` makes of them.
    """
    return _ChosenLogprobs.apply(states, head.weight, head.bias, ids, logits_of, factor, chunk_rows(head))


class _ChosenLogprobs(torch.autograd.Function):
    """Log-probs [N] of `ids` [N] under a linear head on `states` [N, d]."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, logits_of: Callable[[Tensor], Tensor], factor: float, rows: int) -> Tensor:
        """Chunk by chunk; what is kept is the direction of the gradient, or what it is computed from."""
        frozen = not any(ctx.needs_input_grad[1:3])
        keep = not frozen and len(ids) * weight.shape[0] <= KEPT_ELEMENTS
        kept, logprobs = [], []
        for part, chosen in zip(states.split(rows), ids.split(rows), strict=True):
            found = choose(logits_of(part), chosen)
            logprobs.append(found.logprobs)
            if frozen:
                kept.append(product(_push_(found.probabilities, chosen), weight.t()).mul_(-factor).to(states.dtype))
            elif keep:
                kept.append(_push_(found.probabilities, chosen))
            del found
        ctx.frozen, ctx.logits_of, ctx.factor, ctx.rows = frozen, logits_of, factor, rows
        device = states.device.type
        ctx.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        if frozen:
            ctx.save_for_backward(torch.cat(kept))
        else:
            ctx.save_for_backward(states, weight, bias, ids, *kept)
        return torch.cat(logprobs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of states, weight and bias."""
        if ctx.frozen:
            (direction,) = ctx.saved_tensors
            return direction * grad.unsqueeze(1), None, None, None, None, None, None
        states, weight, bias, ids, *kept = ctx.saved_tensors
        to_states, to_weight = torch.empty_like(states), torch.zeros_like(weight)
        to_bias = torch.zeros_like(bias) if bias is not None else None
        device, dtype, enabled = ctx.autocast
        # [N, d] is multiplied with what the loss and the head's scale say, and not [N, V].
        scale = (grad * -ctx.factor).unsqueeze(1)
        with torch.autocast(device, dtype=dtype, enabled=enabled):
            for number, start in enumerate(range(0, len(states), ctx.rows)):
                span = slice(start, start + ctx.rows)
                push = kept[number] if kept else _push_(torch.softmax(ctx.logits_of(states[span]), dim=1), ids[span])
                to_states[span] = product(push, weight.t()) * scale[span]
                if enabled:
                    to_weight += push.t() @ (states[span] * scale[span])
                else:
                    add_weight_gradient(to_weight, states[span] * scale[span], push)
                if to_bias is not None:
                    to_bias += (push * scale[span]).sum(dim=0)
        return to_states, to_weight, to_bias, None, None, None, None


def _push_(probabilities: Tensor, ids: Tensor) -> Tensor:
    """softmax - one-hot of `ids`, in place: minus the gradient of the chosen log-probs with respect to the logits."""
    return probabilities.scatter_add_(1, ids.unsqueeze(1), probabilities.new_full((len(ids), 1), -1.0))
