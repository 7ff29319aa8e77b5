"""The output head of a causal language model: how hidden states become logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from stages.onednn import OneDNNLinear

TIMES = ("logit_scale", "output_multiplier", "lm_head_multiplier")  # Cohere; Muse Glimmer; Falcon-H1


def output_logits(model: Any, hidden: Tensor) -> Tensor:
    """Logits of hidden states, with the scaling and capping that some architectures apply after the head."""
    logits = model.get_output_embeddings()(hidden)
    scale, cap = logits_scale(model), logits_cap(model)
    if scale != 1.0:
        logits = logits * scale
    return logits if cap is None else torch.tanh(logits / cap) * cap


def logits_scale(model: Any) -> float:
    """What the head's output is multiplied by."""
    config = text_config(model)
    times = next((value for name in TIMES if (value := getattr(config, name, None)) is not None), 1.0)
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return times
    return times * scaling if config.model_type == "hyperclovax" else times / scaling  # Granite, MiniCPM3 divide


def logits_cap(model: Any) -> float | None:
    """What logits are squeezed between, plus and minus (Gemma 2); None where they are not."""
    return getattr(text_config(model), "final_logit_softcapping", None)


def is_linear(model: Any) -> bool:
    """Whether logits are a multiple of what a plain linear layer makes of hidden states."""
    return type(model.get_output_embeddings()) in (nn.Linear, OneDNNLinear) and logits_cap(model) is None


def plain(head: Any) -> nn.Linear | None:
    """The linear layer that a head is, or that PEFT trains in its place; None for one with an adapter, or of another kind."""
    active = getattr(head, "active_adapter", None)
    if isinstance(active, str) and active in getattr(head, "modules_to_save", {}):
        head = head.modules_to_save[active]
    return head if type(head) in (nn.Linear, OneDNNLinear) else None


def text_config(model: Any) -> Any:
    """The config of the language model, which is a part of the whole where a model reads images too."""
    whole = model.config
    return whole.get_text_config() if hasattr(whole, "get_text_config") else whole
