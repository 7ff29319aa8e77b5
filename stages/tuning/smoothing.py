"""Label smoothing without logits of the whole vocabulary.

The smoothed loss of a token is (1 - e) (-log p_y) + e mean_v(-log p_v). With z = h W' and log p_v = z_v - lse(z), the second term is
-log p_y + z_y - mean_v(z_v) = -log p_y + h (w_y - mean_v(w_v)): the loss that is computed anyway, plus e times one product per token with the label's row of
the head less the mean row (Szegedy et al. 2016, arXiv:1512.00567, sec. 7, in the form that needs no [tokens, vocabulary] tensor).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from configs.errors import UserError
from stages.loss.head import logits_cap, logits_scale
from stages.zero import gather


def above_mean(hidden: Tensor, labels: Tensor, head: nn.Module) -> Tensor:
    """Sum over labelled tokens of z_y - mean_v(z_v), [] float32.

    hidden: [B, T, d]; labels: [B, T], -100 does not count, shifted here by one as in the loss.
    """
    targets = labels[:, 1:]
    counted = targets != -100
    states, rows = hidden[:, :-1][counted].float(), targets[counted]
    weight: Any = head.weight
    gap = (states * (weight[rows].float() - weight.float().mean(0))).sum()
    bias: Any = getattr(head, "bias", None)
    return gap if bias is None else gap + (bias[rows].float() - bias.float().mean()).sum()


class LastHidden:
    """Keeps what a language model's trunk returned last, so that a loss can be added to without a second forward pass."""

    def __init__(self, model: Any) -> None:
        """Raises UserError: the architecture changes logits after its head, or its trunk can't be told."""
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        if logits_scale(base) != 1.0 or logits_cap(base) is not None:
            raise UserError(f"train.label_smoothing: {type(base).__name__} scales or caps its logits after the head, and the smoothed loss is not that of a plain head; leave it out")
        trunk, self.head = getattr(base, base.base_model_prefix, None), base.get_output_embeddings()
        if trunk is None or trunk is base or self.head is None:
            raise UserError(f"train.label_smoothing: {type(base).__name__} has no trunk and head that can be told apart; leave it out")
        if any(gather.is_split(parameter) for parameter in self.head.parameters()):
            raise UserError(f"train.label_smoothing at ZeRO-3: the loss of {type(base).__name__} is TRL's, and smoothing it reads the whole output head, which is split; use a ZeRO-2 machine file, or leave it out")
        self.value: Tensor | None = None
        trunk.register_forward_hook(self._keep)

    def _keep(self, module: Any, given: Any, output: Any) -> None:
        self.value = output[0] if torch.is_grad_enabled() else None

    def take(self) -> Tensor:
        """[B, T, d] of the last forward pass; forgotten afterwards."""
        found, self.value = self.value, None
        assert found is not None, "the loss was computed without the trunk"
        return found
