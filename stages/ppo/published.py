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
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.errors import UserError
from configs.schema import PPOStage
from stages.ppo.modules import PolicyAndValue
from stages.ppo.state import policy_tensors
from stages.training.resume import depends_on


class PolicyAverage:
    """The average of the policy's trained tensors, in float32; it starts as the policy does. With adapters it holds the adapter alone."""

    def __init__(self, module: PolicyAndValue, decay: float, optimizer: torch.optim.Optimizer) -> None:
        self.decay, self.parameters = decay, policy_tensors(module)
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

    Of a low-rank update only the factor that starts at 0 (B; of an embedding A): the update is then scaled as it is, where a way back of both factors would be no
    straight line.
    """
    return {name: p for name, p in policy_tensors(module).items() if not re.search(r"\.lora_(A|embedding_B)\.", name)}


def start_of(module: PolicyAndValue) -> dict[str, Tensor]:
    """Those weights as they are, in main memory."""
    return {name: _copied(p) for name, p in leads_back(module).items()}


def beginning(cfg: PPOStage, module: PolicyAndValue, save_from: Path | None, identity: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights that `towards_start` leads back to, before the save `save_from` is loaded over them; empty where it is not asked for.

    Raises:
        UserError: the run that is continued began with other weights than `init_from` has now.
    """
    if cfg.towards_start is None:
        return {}
    if save_from is not None and (was := depends_on(save_from).get("parents", identity["parents"])) != identity["parents"]:
        raise UserError(
            f"towards_start leads back to the weights that the run began with, and {cfg.init_from} (or another parent) is not what {save_from.name} was made from: "
            f"{was} then, {identity['parents']} now. Name that checkpoint as init_from again, or leave towards_start out"
        )
    return start_of(module)


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


class Published:
    """The weights that are evaluated and published: (1 - back) * trained + back * start, where `trained` is the average if there is one.

    `back` is 0 where the policy is published as it was trained; `start` is not read then.
    """

    def __init__(self, module: PolicyAndValue, average: PolicyAverage | None = None, start: Mapping[str, Tensor] | None = None, back: float = 0.0) -> None:
        self.parameters, self.average, self.start, self.back = policy_tensors(module), average, start or {}, back
        if back:
            assert self.start.keys() == leads_back(module).keys(), f"the start has other weights: {sorted(self.start.keys() ^ leads_back(module).keys())[:3]}"

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
            if self.back and name in self.start:
                trained = trained.lerp(self.start[name].to(trained), self.back)
            parameter.copy_(trained)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within the block the policy has them; after it, its own to the bit."""
        if self.is_the_policy:
            yield
            return
        own = {name: _copied(p) for name, p in self.parameters.items()}
        self.put_in_place()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in self.parameters.items():
                    parameter.copy_(own[name])
