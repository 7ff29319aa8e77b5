"""The optimizer and its learning rates, which are a function of the iteration alone: there is nothing of them to resume."""

from __future__ import annotations

import math
from typing import Any

import torch

from configs.schema import PPOStage, PPOTrain
from stages.ppo.build import PPOModels
from stages.ppo.modules import PolicyAndValue

WARMUP_START = 0.1  # of the peak, in the first iteration of a warm-up (Ouyang et al. 2022, appendix C.4)


def optimizer_of(cfg: PPOStage, built: PPOModels) -> torch.optim.AdamW:
    """AdamW with the policy's and the value function's parameters in two groups, each with its `peak` learning rate."""
    return torch.optim.AdamW(groups_of(cfg, built.trained), **adamw_arguments(cfg))


def groups_of(cfg: PPOStage, trained: PolicyAndValue) -> list[dict[str, Any]]:
    """The policy's parameters and the value function's, each with its learning rate."""
    train = cfg.train
    rates = (train.learning_rate, train.value_learning_rate or train.learning_rate)
    parameters = (trained.policy_parameters(), trained.value_parameters())
    return [{"params": found, "lr": rate, "peak": rate} for found, rate in zip(parameters, rates, strict=True)]


def adamw_arguments(cfg: PPOStage) -> dict[str, Any]:
    """What AdamW is made with beside its groups."""
    train = cfg.train
    # Fused: in place, without copies the size of the weights, and a ninth of the time on a CPU.
    return {"betas": (train.adam_beta1, train.adam_beta2), "eps": train.adam_epsilon, "weight_decay": train.weight_decay, "fused": True}


def share_of_peak(iteration: int, train: PPOTrain) -> float:
    """The learning rate of an iteration (from 0) as a share of its peak.

    In the warm-up it rises linearly from WARMUP_START and would reach 1 in the first iteration after it. From there `linear` and
    `cosine` fall to the floor, which they would reach in the iteration after the last.
    """
    warmup = train.warmup_iterations
    if iteration < warmup:
        return WARMUP_START + (1.0 - WARMUP_START) * iteration / warmup
    if train.schedule == "constant":
        return 1.0
    done = (iteration - warmup) / (train.iterations - warmup)
    left = 1.0 - done if train.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return train.learning_rate_floor + (1.0 - train.learning_rate_floor) * left


def set_learning_rate(optimizer: Any, cfg: PPOStage, iteration: int) -> None:
    """Give every group its peak's share."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * share_of_peak(iteration, cfg.train)
