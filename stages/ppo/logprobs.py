"""Log-probs of chosen tokens from hidden states, in chunks, with a gradient that keeps no logits.

d logprob / d logits is one-hot minus softmax. Under a frozen head the direction (one-hot - softmax) W of each token's gradient is
known in the forward pass: [N, d] is kept and nothing is computed twice. A head that is trained needs the softmax again: it is
recomputed, chunk by chunk, from the hidden states and the normaliser.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

CHUNK_ELEMENTS = 2**22  # logits of one chunk: 16 MiB in float32, of which two are alive at once
CHUNK_ELEMENTS_GPU = 2**24  # fewer, larger products


class Chosen(NamedTuple):
    """What logits say about the tokens that were chosen, all [N], in nats but `total`."""

    logprobs: Tensor
    normaliser: Tensor
    total: Tensor  # sum of exp(logit - the row's highest)
    entropy: Tensor | None


def chunk_rows(head: Any) -> int:
    """Hidden states whose logits fit one chunk."""
    elements = CHUNK_ELEMENTS_GPU if head.weight.device.type == "cuda" else CHUNK_ELEMENTS
    return max(1, elements // head.weight.shape[0])


def choose_(logits: Tensor, ids: Tensor, *, entropy: bool = False) -> Chosen:
    """Read logits [N, V] in float32 and turn them, in place, into exp(logit - the row's highest)."""
    chosen = logits.gather(1, ids.unsqueeze(1)).squeeze(1)
    highest = logits.amax(dim=1)
    logits.sub_(highest.unsqueeze(1))
    shifted = logits.clone() if entropy else None
    total = logits.exp_().sum(dim=1)
    normaliser = highest + total.log()
    return Chosen(chosen - normaliser, normaliser, total, total.log() - torch.linalg.vecdot(logits, shifted) / total if shifted is not None else None)


def chosen_logprobs(head: nn.Linear, states: Tensor, ids: Tensor, logits_of: Callable[[Tensor], Tensor], factor: float) -> Tensor:
    """Log-probs [N] of `ids` [N], in nats, with gradients for `states` [N, d] and for what of `head` is trained.

    `logits_of` gives fresh float32 logits of hidden states: `factor` times what `head` makes of them.
    """
    return _ChosenLogprobs.apply(states, head.weight, head.bias, ids, logits_of, factor, chunk_rows(head))


class _ChosenLogprobs(torch.autograd.Function):
    """Log-probs [N] of `ids` [N] under a linear head on `states` [N, d]."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, logits_of: Callable[[Tensor], Tensor], factor: float, rows: int) -> Tensor:
        """Chunk by chunk; what is kept is the direction of the gradient, or what the softmax is recomputed from."""
        frozen = not any(ctx.needs_input_grad[1:3])
        kept, logprobs = [], []
        for part, chosen in zip(states.split(rows), ids.split(rows), strict=True):
            logits = logits_of(part)
            found = choose_(logits, chosen)
            logprobs.append(found.logprobs)
            if frozen:
                kept.append((_pull_(logits.div_(found.total.unsqueeze(1)), chosen, factor) @ weight).to(states.dtype))
            else:
                kept.append(found.normaliser)
            del logits
        ctx.frozen, ctx.logits_of, ctx.factor, ctx.rows = frozen, logits_of, factor, rows
        device = states.device.type
        ctx.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        if frozen:
            ctx.save_for_backward(torch.cat(kept))
        else:
            ctx.save_for_backward(states, weight, bias, ids, torch.cat(kept))
        return torch.cat(logprobs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of states, weight and bias."""
        if ctx.frozen:
            (direction,) = ctx.saved_tensors
            return direction * grad.unsqueeze(1), None, None, None, None, None, None
        states, weight, bias, ids, normaliser = ctx.saved_tensors
        to_states, to_weight = torch.empty_like(states), torch.zeros_like(weight)
        to_bias = torch.zeros_like(bias) if bias is not None else None
        device, dtype, enabled = ctx.autocast
        with torch.autocast(device, dtype=dtype, enabled=enabled):
            for start in range(0, len(states), ctx.rows):
                span = slice(start, start + ctx.rows)
                softmax = ctx.logits_of(states[span]).sub_(normaliser[span].unsqueeze(1)).exp_()
                pull = _pull_(softmax, ids[span], ctx.factor).mul_(grad[span].unsqueeze(1))
                to_states[span] = pull @ weight
                if enabled:
                    to_weight += pull.t() @ states[span]
                else:
                    to_weight.addmm_(pull.t(), states[span])
                if to_bias is not None:
                    to_bias += pull.sum(dim=0)
        return to_states, to_weight, to_bias, None, None, None, None


def _pull_(softmax: Tensor, ids: Tensor, factor: float) -> Tensor:
    """factor * (one-hot of `ids` - softmax), in place: the gradient of the chosen log-probs with respect to the head's output."""
    softmax.scatter_add_(1, ids.unsqueeze(1), softmax.new_full((len(ids), 1), -1.0))
    return softmax.mul_(-factor)
