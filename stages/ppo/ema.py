"""An exponential moving average of the policy's weights: what is published in their place where it is switched on.

Ouyang et al. 2022 (arXiv:2203.02155, appendix C.4) publish such averages with a decay of 0.992; here it is updated after every
optimizer step, so it looks back about 1 / (1 - decay) steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from stages.ppo.modules import PolicyAndValue


class PolicyAverage:
    """The average of the policy's trained tensors, in float32; it starts as the policy does. With adapters it holds the adapter alone."""

    def __init__(self, module: PolicyAndValue, decay: float, optimizer: torch.optim.Optimizer) -> None:
        trained = {id(p) for p in module.policy_parameters()}
        self.decay = decay
        self.parameters = {name: p for name, p in module.named_parameters() if id(p) in trained}
        self.tensors = {name: p.detach().float().clone() for name, p in self.parameters.items()}
        optimizer.register_step_post_hook(lambda stepped, *_: self.update(getattr(stepped, "called_off", None)))

    @torch.no_grad()
    def update(self, called_off: Tensor | None = None) -> None:
        """average = decay * average + (1 - decay) * weights; as it is after a step that was not taken (`called_off` is 1, [])."""
        share: Any = 1.0 - self.decay if called_off is None else (1.0 - self.decay) * (1.0 - called_off)
        for name, parameter in self.parameters.items():
            self.tensors[name].lerp_(parameter.float(), share)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from a save."""
        assert tensors.keys() == self.tensors.keys(), f"the save averages other weights: {sorted(tensors.keys() ^ self.tensors.keys())[:3]}"
        for name, tensor in tensors.items():
            self.tensors[name].copy_(tensor)

    @torch.no_grad()
    def put_in_place(self) -> None:
        """Give the policy the averaged weights, for good: when training is over."""
        for name, parameter in self.parameters.items():
            parameter.copy_(self.tensors[name])


@contextmanager
def averaged(average: PolicyAverage | None) -> Iterator[None]:
    """Within the block the policy has the averaged weights, where there is an average; after it, its own to the bit."""
    if average is None:
        yield
        return
    own = {name: p.detach().clone() for name, p in average.parameters.items()}
    average.put_in_place()
    try:
        yield
    finally:
        with torch.no_grad():
            for name, parameter in average.parameters.items():
                parameter.copy_(own[name])
