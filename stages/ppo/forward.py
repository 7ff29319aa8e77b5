"""Log-probs, entropy and values at completion positions, without the logits of a rollout ever being held.

Only hidden states of completion positions reach the output head, and in chunks, none of which outlives a call (stages/loss/logprobs.py).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from stages import soft
from stages.loss.head import is_linear, logits_scale, output_logits
from stages.loss.logprobs import choose, chosen_logprobs, chunk_rows, pad_last_chunk
from stages.onednn import widened
from stages.ppo.rollout import Tokens


class TokenOutputs(NamedTuple):
    """Log-probs of the sampled tokens and entropy of the distribution they came from, [B, T], nats, 0 where masked."""

    logprobs: Tensor
    entropy: Tensor | None


def hidden_states(trunk: Any, tokens: Tokens) -> Tensor:
    """Last hidden states from which each completion token is predicted, and one after the last: [B, T + 1, d].

    The model reads rows that begin at position 0 and are padded on the right, where a causal model does not look: it needs no mask,
    which saves building one and a few percent of attention.
    """
    starts, longest = tokens.prompt_mask.sum(dim=1, keepdim=True), tokens.longest()
    limit = soft.room(trunk) or longest
    width = max(longest, min(widened(longest, trunk), limit))
    states = trunk(input_ids=tokens.flush_left(width), use_cache=False).last_hidden_state
    columns = starts - 1 + torch.arange(tokens.mask.shape[1] + 1, device=starts.device)
    index = columns.clamp(0, states.shape[1] - 1).unsqueeze(2).expand(-1, -1, states.shape[2])
    return states.gather(1, index)


def token_outputs(model: Any, hidden: Tensor, tokens: Tokens, *, temperature: float, entropy: bool = False) -> TokenOutputs:
    """Log-probs (and entropy) of the sampled tokens from hidden states [B, T + 1, d], at the sampling temperature.

    Entropy has no gradient.
    """
    mask, head = tokens.mask, model.get_output_embeddings()
    real, targets = pad_last_chunk(head, hidden[:, :-1][mask], tokens.completion_ids[mask])

    def logits_of(states: Tensor) -> Tensor:
        logits = output_logits(model, states).float()
        return logits if temperature == 1.0 else logits.div_(temperature)

    parts = list(zip(real.split(chunk_rows(head)), targets.split(chunk_rows(head)), strict=True))
    entropies = None
    if entropy or not torch.is_grad_enabled():
        with torch.no_grad():
            found = [choose(logits_of(states), ids, entropy=entropy)[:2] for states, ids in parts]
        logprobs = torch.cat([part[0] for part in found])
        entropies = torch.cat([part[1] for part in found if part[1] is not None]) if entropy else None
    if torch.is_grad_enabled() and is_linear(model):
        logprobs = chosen_logprobs(head, real, targets, logits_of, logits_scale(model) / temperature)
    elif torch.is_grad_enabled():
        logprobs = torch.cat([checkpoint(_recomputed, model, states, ids, temperature, use_reentrant=False) for states, ids in parts])
    return TokenOutputs(_scatter(logprobs, mask), _scatter(entropies, mask) if entropies is not None else None)


def _recomputed(model: Any, states: Tensor, ids: Tensor, temperature: float) -> Tensor:
    """Log-probs of `ids` under a head that is not a plain linear layer, for autograd."""
    return torch.log_softmax(output_logits(model, states).float() / temperature, dim=-1).gather(1, ids.unsqueeze(1)).squeeze(1)


def _scatter(values: Tensor, mask: Tensor) -> Tensor:
    """Values of the True positions, in order, laid out as [B, T] with zeros elsewhere."""
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values[: int(mask.sum())])
