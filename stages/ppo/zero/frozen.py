"""Frozen models at ZeRO-3, each process holding its share of their weights: the reference and reward models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from stages.ppo.modules import AdapterSwitch, PolicyAndValue, Reference
from stages.ppo.rollout import Tokens
from stages.ppo.zero.engines import Calls, Unhooked, Zero, engine_of, split


class ShardedReference(Reference):
    """A reference whose log-probs come through an engine: its own, or with adapters off the trained one's."""

    def __init__(self, model: Any, engine: Any, *, temperature: float, switch: AdapterSwitch | None = None) -> None:
        super().__init__(model, temperature=temperature, switch=switch)
        self.engine = engine

    @torch.no_grad()
    def logprobs(self, tokens: Tokens) -> Tensor:
        """Log-probs of the sampled tokens under the reference, [B, T], nats. A collective."""
        if self.switch is None:
            return self.engine("logprobs", tokens=tokens).logprobs
        with self.switch.on(None):
            return self.engine("logprobs", tokens=tokens).logprobs


def split_reference(model: Any, zero: Zero, *, temperature: float, arithmetic: Callable[[], AbstractContextManager[Any]]) -> ShardedReference:
    """A reference of its own, split over the processes. A collective."""
    part = PolicyAndValue(split(model, zero), None, None, temperature=temperature)
    reader = Unhooked(model)
    part.output = (reader,)
    return ShardedReference(model, engine_of(Calls(part, arithmetic, reader.head), zero), temperature=temperature)


def split_trunk(model: Any, zero: Zero) -> Any:
    """A reward model whose trunk is split over the processes; its head, one row of weights, is everywhere. A collective."""
    engine_of(split(model.base_model, zero), zero)
    return model


class TrunkCalls(nn.Module):
    """The trunk of a shared backbone for a scorer, called through the engine that holds it."""

    def __init__(self, engine: Any, policy: Any) -> None:
        super().__init__()
        self.of = (engine, policy)  # in a tuple, lest they become this module's
        self.config = policy.config

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """The backbone's."""
        return self.of[1].parameters(recurse)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor | None = None, use_cache: bool = False) -> Any:
        """What the trunk returns."""
        return self.of[0]("trunk", input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=use_cache)
