"""The shared backbone in 4 bits under its adapters (QLoRA, Dettmers et al. 2023, arXiv:2305.14314).

Frozen linear layers but the output head are kept as NF4; adapters, heads, embeddings and norms stay in float32. Policy and reference
round alike, as they are the same weights: KL still starts at 0. A reward adapter in place reads the rounded weights too.
"""

from __future__ import annotations

import torch

from configs.schema import PPOStage
from stages.tuning.possible import check_quantization


def check(cfg: PPOStage, device: torch.device) -> None:
    """Whether this machine can do what `quantization` asks, before anything is loaded.

    Raises:
        UserError: no GPU (MissingExtra: no bitsandbytes).
    """
    if cfg.quantization is not None:
        check_quantization(f"quantization: {cfg.quantization}", device.type, "leave `quantization` out")
