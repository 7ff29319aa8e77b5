"""What this machine and its processes can't train, said before anything is loaded."""

from __future__ import annotations

import torch

from configs.errors import UserError
from configs.extras import need
from configs.schema import Full, SFTTrain, TRLStage, lora_of
from stages.zero.machine import zero_stage


def check(cfg: TRLStage) -> None:
    """Make sure that the stage's technique can be trained here.

    Raises:
        UserError: 4 bits without an NVIDIA GPU (MissingExtra: without bitsandbytes), or a technique that ZeRO's split does not allow.
    """
    technique, lora, zero = cfg.technique, lora_of(cfg), zero_stage()
    if lora is not None and lora.quantization is not None:
        check_quantization(f"quantization: {lora.quantization}", "cuda" if torch.cuda.is_available() else "cpu", "use method: lora")
        if zero == 3:
            raise UserError(f"quantization {lora.quantization} at ZeRO-3: packed weights can't be split; use a ZeRO-2 machine file")
    if lora is not None and lora.changes_base and zero == 3:
        raise UserError(f"init: {lora.init} at ZeRO-3: it decomposes whole weights, and no process holds one; use a ZeRO-2 machine file, or init: default")
    if lora is not None and lora.dora and zero == 3:
        raise UserError("dora at ZeRO-3: it needs the norm of whole weights in every step, and they are split over the processes; use a ZeRO-2 machine file, or leave dora out")
    if isinstance(cfg.train, SFTTrain) and cfg.train.label_smoothing and cfg.train.loss_chunk is None and zero == 3:
        raise UserError("train.label_smoothing at ZeRO-3: it reads the whole output head, which is split over the processes; use a ZeRO-2 machine file, train.loss_chunk: auto, or leave it out")
    if isinstance(technique, Full) and technique.freeze is not None and technique.freeze.unfreeze_every is not None and zero:
        raise UserError(
            f"tune.freeze.unfreeze_every under DeepSpeed ZeRO-{zero}: its optimizer lays all trained weights out once, and would move frozen ones by decay and momentum; use a machine "
            "file without DeepSpeed (gpu_ddp, cpu_ddp), or freeze without a schedule"
        )


def check_quantization(what: str, device: str, otherwise: str) -> None:
    """Make sure that weights can be kept in 4 bits.

    Raises:
        UserError: no GPU (MissingExtra: no bitsandbytes).
    """
    if device != "cuda":
        raise UserError(f"{what} needs an NVIDIA GPU and this run is on {device}; {otherwise}")
    need("bitsandbytes", what, "quantization")
