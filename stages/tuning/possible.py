"""What this machine and its processes can't train, said before anything is loaded."""

from __future__ import annotations

import torch

from configs.errors import UserError
from configs.extras import need
from configs.schema import TRLStage, lora_of
from configs.splitting import refused
from stages.zero.machine import zero_stage


def check(cfg: TRLStage) -> None:
    """Make sure that the stage's technique can be trained here.

    Raises:
        UserError: 4 bits without an NVIDIA GPU (MissingExtra: without bitsandbytes), or a technique that ZeRO's split does not allow.
    """
    lora = lora_of(cfg)
    if lora is not None and lora.quantization is not None:
        check_quantization(f"quantization: {lora.quantization}", "cuda" if torch.cuda.is_available() else "cpu", "use method: lora")
    if problem := refused(cfg, zero_stage()):
        raise UserError(problem)


def check_quantization(what: str, device: str, otherwise: str) -> None:
    """Make sure that weights can be kept in 4 bits.

    Raises:
        UserError: no GPU (MissingExtra: no bitsandbytes).
    """
    if device != "cuda":
        raise UserError(f"{what} needs an NVIDIA GPU and this run is on {device}; {otherwise}")
    need("bitsandbytes", what, "quantization")
