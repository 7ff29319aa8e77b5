"""What is published in the policy's place where the config asks for it: a running average of its weights, weights part of the way back
to where it started, or that way taken from the average.

Ouyang et al. 2022 (arXiv:2203.02155, appendix C.4) publish averages with a decay of 0.992; here it is updated after every optimizer
step, so it looks back about 1 / (1 - decay) steps. Weights between the start and the trained policy keep most of the score and shed
more than their share of the KL (Ramé et al. 2024, arXiv:2406.16768; Lin et al. 2023, arXiv:2309.06256): KL grows with the square of
the distance near the start, the score in proportion to it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from stages.ppo.modules import PolicyAndValue


def policy_weights(module: PolicyAndValue) -> dict[str, Any]:
    """The trained parameters of the policy, by name; with adapters its adapter's alone."""
    trained = {id(p) for p in module.policy_parameters()}
    return {name: p for name, p in module.named_parameters() if id(p) in trained}


class PolicyAverage:
    """The average of the policy's trained tensors, in float32; it starts as the policy does."""

    def __init__(self, module: PolicyAndValue, decay: float, optimizer: torch.optim.Optimizer) -> None:
        self.decay, self.parameters = decay, policy_weights(module)
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


def leads_back(module: PolicyAndValue) -> dict[str, Any]:
    """The policy's weights that go back towards where they started.

    Of a low-rank update B A only B, which starts at 0: the update is then scaled as B is, where a way back of both factors would be no straight line.
    """
    return {name: p for name, p in policy_weights(module).items() if not re.search(r"\.lora_(embedding_)?A\.", name)}


def start_of(module: PolicyAndValue) -> dict[str, Tensor]:
    """Those weights as they are, in main memory; to be taken before a run that goes on loads its save."""
    return {name: p.detach().cpu().clone() for name, p in leads_back(module).items()}


class Published:
    """The weights that are evaluated and published: (1 - back) * trained + back * start, where `trained` is the average if there is one.

    `back` is 0 where the policy is published as it was trained; `start` is not read then.
    """

    def __init__(self, module: PolicyAndValue, average: PolicyAverage | None = None, start: Mapping[str, Tensor] | None = None, back: float = 0.0) -> None:
        self.parameters, self.average, self.start, self.back = policy_weights(module), average, start or {}, back
        assert self.start.keys() <= self.parameters.keys(), f"the start has other weights: {sorted(self.start.keys() - self.parameters.keys())[:3]}"

    @property
    def is_the_policy(self) -> bool:
        """Whether the policy itself is published, as it was trained."""
        return self.average is None and not self.back

    @torch.no_grad()
    def put_in_place(self) -> None:
        """Give them to the policy, for good: when training is over."""
        if self.is_the_policy:
            return
        for name, parameter in self.parameters.items():
            trained = self.average.tensors[name] if self.average is not None else parameter.float()
            if name in self.start and self.back:
                trained = trained.lerp(self.start[name].to(trained), self.back)
            parameter.copy_(trained)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within the block the policy has them; after it, its own to the bit."""
        if self.is_the_policy:
            yield
            return
        own = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.put_in_place()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in self.parameters.items():
                    parameter.copy_(own[name])
