"""Log-probs, entropy and values at completion positions, without the logits of a rollout ever being held.

Only hidden states of completion positions reach the output head, and in chunks; a chunk's logits are recomputed in the
backward pass. What outlives a call is one number per sampled token.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stages.ppo.rollout import Tokens

CHUNK_ELEMENTS = 2**24  # logits of one chunk: 64 MiB in float32


class TokenOutputs(NamedTuple):
    """Log-probs of the sampled tokens and entropy of the distribution they came from, [B, T], nats, 0 where masked."""

    logprobs: Tensor
    entropy: Tensor | None


def hidden_states(trunk: nn.Module, tokens: Tokens) -> Tensor:
    """Last hidden states from which each completion token is predicted, and one after the last: [B, T + 1, d]."""
    out = trunk(
        input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, position_ids=tokens.position_ids, use_cache=False
    )
    return out.last_hidden_state[:, tokens.prompt_ids.shape[1] - 1 :]


def output_logits(model: Any, hidden: Tensor) -> Tensor:
    """Logits of hidden states, with the scaling and capping that some architectures apply after the head."""
    logits = model.get_output_embeddings()(hidden)
    config = model.config
    if getattr(config, "logit_scale", None) is not None:
        logits = logits * config.logit_scale
    if getattr(config, "logits_scaling", None) is not None:
        logits = logits / config.logits_scaling
    if getattr(config, "final_logit_softcapping", None) is not None:
        logits = torch.tanh(logits / config.final_logit_softcapping) * config.final_logit_softcapping
    return logits


def token_outputs(model: Any, hidden: Tensor, tokens: Tokens, *, temperature: float, entropy: bool = False) -> TokenOutputs:
    """Log-probs (and entropy) of the sampled tokens from hidden states [B, T + 1, d], at the sampling temperature."""
    mask = tokens.mask
    real, targets = hidden[:, :-1][mask], tokens.completion_ids[mask]
    rows = max(1, CHUNK_ELEMENTS // model.get_output_embeddings().weight.shape[0])

    def outputs_of(states: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        logits = output_logits(model, states).float() / temperature
        normaliser = logits.logsumexp(dim=-1)
        chosen = logits.gather(1, ids.unsqueeze(1)).squeeze(1) - normaliser
        if not entropy:
            return chosen, chosen
        return chosen, normaliser - (torch.softmax(logits, dim=-1) * logits).sum(dim=-1)

    recompute = torch.is_grad_enabled() and real.shape[0] > rows
    parts = [
        checkpoint(outputs_of, states, ids, use_reentrant=False) if recompute else outputs_of(states, ids)
        for states, ids in zip(real.split(rows), targets.split(rows), strict=True)
    ]
    chosen = _scatter(torch.cat([part[0] for part in parts]) if parts else real.new_zeros(0).float(), mask)
    return TokenOutputs(chosen, _scatter(torch.cat([part[1] for part in parts]), mask) if entropy and parts else None)


def _scatter(values: Tensor, mask: Tensor) -> Tensor:
    """Values of the True positions, in order, laid out as [B, T] with zeros elsewhere."""
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)
