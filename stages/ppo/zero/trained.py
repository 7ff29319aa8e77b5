"""Policy and value function in DeepSpeed's engines: the same calls as on the plain module, with gradients that ZeRO splits.

With full training they are two engines, as two models of their own would be: each has its own trace of modules to prefetch by, and its
own gradients. Where they share a trunk (adapters, or a value head on the policy's states) they are one. Either way each has a backward pass
of its own, so that their graphs are never alive together, and a norm of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from configs.schema import PPOStage
from stages.compat import without_engine_hooks
from stages.ppo.forward import TokenOutputs
from stages.ppo.modules import POLICY, Outputs, PolicyAndValue, is_of
from stages.ppo.optimizer import adamw_arguments, groups_of
from stages.ppo.rollout import Tokens
from stages.ppo.zero.engines import Calls, Unhooked, Zero, engine_of, unique
from stages.ppo.zero.optimizer import ShardedOptimizer, arrived, shard_adamw
from stages.ppo.zero.steps import Stepped
from stages.zero.gather import state, whole


class ShardedPolicyAndValue(PolicyAndValue):
    """The trained module in engines; made by `engage`. Every call of it is made by all processes alike at ZeRO-3, every backward pass always."""

    lockstep = True

    def __init__(self, plain: PolicyAndValue, zero: Zero) -> None:
        super().__init__(plain.policy, plain.value_trunk, plain.value_head, temperature=plain.temperature, switch=plain.switch)
        self.zero = zero
        self.engines: dict[str, Any] = {}
        self.optimizer: Any = None
        self._left: dict[int, int] = {}
        self._gathered = False
        self._stepped: Stepped | None = None  # where the policy stays split while it is sampled from

    def forward(self, tokens: Tokens, entropy: bool = False) -> Outputs:
        """Log-probs and values of a batch of prompts and completions."""
        if self.shares_trunk:
            return self.engines["policy"]("forward", tokens=tokens, entropy=entropy)
        return super().forward(tokens, entropy)

    def logprobs(self, tokens: Tokens, entropy: bool = False) -> TokenOutputs:
        """The policy alone."""
        return self.engines["policy"]("logprobs", tokens=tokens, entropy=entropy)

    def imitation(self, tokens: Tokens, counts: Tensor) -> Tensor:
        """Log-probs of the tokens that count, at temperature 1."""
        return self.engines["policy"]("imitation", tokens=tokens, counts=counts)

    def values(self, tokens: Tokens) -> Tensor:
        """The value function alone, [B, T + 1], within `value_pass`."""
        return self.engines["value"]("values", tokens=tokens)

    def expect(self, *, policy: int, value: int) -> None:
        """Count the backward passes of each engine: DeepSpeed wants to know which one is the last."""
        counts = {"policy": policy, "value": 0 if self.shares_trunk else value}
        self._left = {}
        for of, engine in self.engines.items():
            self._left[id(engine)] = self._left.get(id(engine), 0) + counts[of]

    def backward(self, loss: Tensor, of: str) -> None:
        """Add a loss's gradients, summed over the processes: DeepSpeed takes their mean."""
        engine = self.engines[of]
        assert loss.requires_grad, "a loss without a gradient: the other processes would wait for this one's"
        self._left[id(engine)] -= 1
        assert self._left[id(engine)] >= 0, "more backward passes than were announced"
        engine.set_gradient_accumulation_boundary(self._left[id(engine)] == 0)
        engine.backward(loss * torch.distributed.get_world_size())

    @torch.no_grad()
    def settle(self, accelerator: Any, limit: float | None, *, policy_learns: bool) -> dict[str, Tensor]:
        """Clip each norm for itself, on each process's share of the gradients."""
        self.optimizer.sleep("policy", not policy_learns)
        shares = {"policy": self._gradients("policy", self.policy_parameters()) if policy_learns else [], "value": self._gradients("value", self.value_parameters())}
        none = torch.zeros((), dtype=torch.float64, device=accelerator.device)
        squares = torch.stack([sum((g.double().square().sum().to(none.device) for g, _ in found), none) for found in shares.values()])
        torch.distributed.all_reduce(squares)
        norms = dict(zip(shares, squares.sqrt(), strict=True))
        for of, found in shares.items() if limit is not None else ():
            factor = (limit / (norms[of] + 1e-6)).clamp(max=1.0)  # as torch's clip_grad_norm_
            for gradient, put in found:
                put(gradient.mul_(factor.to(gradient)))
        return {f"{of}/grad_norm": norm for of, norm in norms.items()}

    def _gradients(self, of: str, parameters: list[nn.Parameter]) -> list[tuple[Tensor, Callable[[Tensor], Any]]]:
        """This process's share of each parameter's gradient (none for one that lies wholly with others), and what writes it back. In main memory, at ZeRO-1 and 2,
        the shares of all that the engine trains, which is `of` alone.
        """
        if self.zero.splits_weights:
            from deepspeed.utils import safe_get_local_grad, safe_set_local_grad

            return [(safe_get_local_grad(p), partial(safe_set_local_grad, p)) for p in parameters]
        if self.engines[of].optimizer.cpu_offload:
            arrived()
            return [(flat.grad, lambda g: g) for flat in self.engines[of].optimizer.single_partition_of_fp32_groups]
        mappings = [(p._hp_mapping, p._index_in_param_group) for p in parameters if getattr(p, "_hp_mapping", None) is not None]  # type: ignore[attr-defined]
        return [(mapping.get_lp_grad_fragment(index), lambda g: g) for mapping, index in mappings]

    @property
    def sampler(self) -> Any:
        """What completions are sampled from, within `for_sampling`."""
        return self._stepped or self.policy

    @contextmanager
    def for_sampling(self) -> Iterator[None]:
        """At ZeRO-3 the policy's weights are whole on every process within the block, gathered once, and DeepSpeed's hooks are off; or,
        with engine.gather: layer, they stay split, and the block ends when every process has come to its end.

        Processes may call `sampler` as often as each likes. Adapters of the value function and of a reward model are not gathered.
        """
        if not self.zero.splits_weights or self._gathered:
            yield
            return
        if self._stepped is not None:
            yield
            self._stepped.wait()
            return
        self._gathered = True
        try:
            engine = self.engines["policy"]
            engine.empty_partition_cache()
            needed = [p for n, p in self.policy.named_parameters() if ".lora_" not in n or is_of(n, POLICY)]
            with whole(needed), without_engine_hooks(engine):
                yield
        finally:
            self._gathered = False

    def state_to_publish(self, published: Any, *, adapter: bool) -> dict[str, Tensor] | None:
        """The policy's whole tensors on rank 0, an adapter's alone; None elsewhere. A collective."""
        return state(published, (lambda name, _: is_of(name, POLICY)) if adapter else None)


def engage(plain: PolicyAndValue, cfg: PPOStage, zero: Zero, arithmetic: Callable[[], AbstractContextManager[Any]]) -> tuple[ShardedPolicyAndValue, ShardedOptimizer]:
    """Put the trained module, as its weights are now, into engines, and make their optimizer. A collective."""
    sharded = ShardedPolicyAndValue(plain, zero)
    reader = Unhooked(plain.policy) if zero.splits_weights else None
    policy_group, value_group = (group | {"of": of} for group, of in zip(groups_of(cfg, plain), ("policy", "value"), strict=True))
    if plain.value_trunk is not None:
        parts = {"policy": (PolicyAndValue(plain.policy, None, None, temperature=plain.temperature), [policy_group]),
                 "value": (PolicyAndValue(None, plain.value_trunk, plain.value_head, temperature=plain.temperature), [value_group])}  # fmt: skip
    else:
        both = PolicyAndValue(plain.policy, None, plain.value_head, temperature=plain.temperature, switch=plain.switch)
        parts = {"policy": (both, [policy_group, value_group])}
    inner = []
    for of, (part, groups) in parts.items():
        if of == "policy" and reader is not None:
            part.output = (reader,)
        inner.append(shard_adamw(groups, **adamw_arguments(cfg)))
        sharded.engines[of] = engine_of(Calls(part, arithmetic, reader.head if reader is not None and of == "policy" else None), zero, inner[-1])
    sharded.engines.setdefault("value", sharded.engines["policy"])
    if zero.splits_weights and cfg.engine.gather == "layer":
        sharded._stepped = Stepped(sharded.engines["policy"], plain.policy)
    trained = [p for p in sharded.parameters() if p.requires_grad]
    sharded.optimizer = ShardedOptimizer(unique(sharded.engines.values()), inner, zero.stage, trained)
    sharded.optimizer.zero_grad()
    return sharded, sharded.optimizer
