"""How an optimizer step is not taken although the host does not know yet that it won't be."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def innermost(optimizer: Any) -> Any:
    """The torch optimizer inside of Accelerate's and DeepSpeed's."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def optimizers_in(optimizer: Any) -> list[Any]:
    """The torch optimizers that an optimizer consists of: PPO's under ZeRO has one for each engine."""
    return list(getattr(optimizer, "inner", [innermost(optimizer)]))


def reads_flag(optimizer: Any) -> bool:
    """Whether a step of this optimizer can be called off on the device: fused Adam and AdamW read `found_inf`, as a GradScaler sets it."""
    from torch.distributed.tensor import DTensor

    groups = optimizer.param_groups
    return isinstance(optimizer, torch.optim.Adam) and all(group.get("fused") and not any(isinstance(p, DTensor) for p in group["params"]) for group in groups)


def skip_all_if(flag: Tensor, optimizer: Any) -> None:
    """`skip_if` for all that an optimizer consists of; what is called after its steps finds the flag as its `called_off`."""
    optimizer.called_off = flag
    for inner in optimizers_in(optimizer):
        skip_if(flag, inner)


def skip_if(flag: Tensor, optimizer: Any) -> None:
    """Make the optimizer's next step leave weights, moments and step counts untouched where `flag` ([] float32) is 1.

    Optimizers that can't read it are asked about it here, which waits for the device once a step: without gradients they do nothing.
    """
    if reads_flag(optimizer):
        # An optimizer in main memory would fetch it without waiting for it to arrive, and read whatever is there. ZeRO-3 fills one group at a time.
        held = next((parameter for group in optimizer.param_groups for parameter in group["params"]), flag)
        optimizer.found_inf = flag.to(held.device)
    elif flag:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None
