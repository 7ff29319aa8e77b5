"""What a stage can't do where DeepSpeed ZeRO splits it, told from its config alone: the stages refuse it, and no plan suggests it."""

from __future__ import annotations

from typing import Any

from configs.schema import IA3, Full, Lora, PPOStage, SFTTrain, lora_of, technique_of

PROMPT_IS_SPLIT = "ZeRO-3 splits the weights that the prompt is put in front of; use a ZeRO-2 machine file or one without DeepSpeed"


def refused(cfg: Any, zero: int, *, offload_optimizer: str = "none", prompt_in_front: bool = False) -> str | None:
    """Why a stage refuses to run at a ZeRO stage (0: without DeepSpeed), with what to do; None where it runs.

    offload_optimizer: the machine file's offload_optimizer_device. prompt_in_front: a soft prompt is trained, or stands in front of the stage's model.
    """
    problems = _ppo(cfg, zero, offload_optimizer) if isinstance(cfg, PPOStage) else _supervised(cfg, zero)
    if zero == 3 and (prompt_in_front or trains_prompt(cfg)):
        problems.append(PROMPT_IS_SPLIT)
    return next(iter(problems), None)


def trains_prompt(cfg: Any) -> bool:
    """Whether the stage trains a soft prompt."""
    return not isinstance(technique_of(cfg), Full | Lora | IA3)


def _supervised(cfg: Any, zero: int) -> list[str]:
    technique, lora = technique_of(cfg), lora_of(cfg)
    found = []
    if isinstance(technique, Full) and technique.freeze is not None and technique.freeze.unfreeze_every is not None and zero:
        found.append(
            f"tune.freeze.unfreeze_every under DeepSpeed ZeRO-{zero}: its optimizer lays all trained weights out once, and would move frozen ones by decay and momentum; use a machine "
            "file without DeepSpeed (gpu_ddp, cpu_ddp), or freeze without a schedule"
        )
    if zero < 3:
        return found
    if lora is not None and lora.quantization is not None:
        found.append(f"quantization {lora.quantization} at ZeRO-3: packed weights can't be split; use a ZeRO-2 machine file")
    if lora is not None and lora.changes_base:
        found.append(f"init: {lora.init} at ZeRO-3: it decomposes whole weights, and no process holds one; use a ZeRO-2 machine file, or init: default")
    if lora is not None and lora.dora:
        found.append("dora at ZeRO-3: it needs the norm of whole weights in every step, and they are split over the processes; use a ZeRO-2 machine file, or leave dora out")
    if isinstance(cfg.train, SFTTrain) and cfg.train.label_smoothing and cfg.train.loss_chunk is None:
        found.append("train.label_smoothing at ZeRO-3: it reads the whole output head, which is split over the processes; use a ZeRO-2 machine file, train.loss_chunk: auto, or leave it out")
    return found


def _ppo(cfg: PPOStage, zero: int, offload_optimizer: str) -> list[str]:
    shared = cfg.lora is not None or cfg.value_function == "head"
    found = {
        f"offload_optimizer_device {offload_optimizer} with one trunk for policy and value function (lora, or value_function: head): leave it at none, or "
        "use value_function: copy": offload_optimizer != "none" and shared,
        "offload_optimizer_device nvme: PPO keeps the optimizer in memory; use cpu or none": offload_optimizer == "nvme",
        "ema_decay at ZeRO-3: the average would need the whole policy on every process; use a ZeRO-2 machine file": zero == 3 and cfg.ema_decay is not None,
        "towards_start at ZeRO-3: the way back would need the whole policy on every process; use a ZeRO-2 machine file": zero == 3 and cfg.towards_start is not None,
        "lora.dora at ZeRO-3: it needs the norm of whole weights in every step; use a ZeRO-2 machine file": zero == 3 and cfg.lora is not None and cfg.lora.dora,
        "quantization at ZeRO-3: packed weights can't be split; use a ZeRO-2 machine file": zero == 3 and cfg.quantization is not None,
        "offload_frozen at ZeRO-3: frozen models are split over the processes already; set it to false, or offload_param_device: cpu in the machine "
        "file": zero == 3 and cfg.offload_frozen,
    }  # fmt: skip
    return [problem for problem, there in found.items() if there]
