"""The optimizer of engines: AdamW on each process's share of the parameters, and what of its state this process saves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from configs.errors import UserError


class ShardAdamW(torch.optim.AdamW):
    """AdamW whose groups can sleep: a group that sleeps is left as it is, its state too, although DeepSpeed gives it gradients of zero."""

    def step(self, closure: Any = None) -> Any:
        """One step of the groups that are awake."""
        asleep = [(p, p.grad) for group in self.param_groups if group["asleep"] for p in group["params"]]
        for parameter, _ in asleep:
            parameter.grad = None
        try:
            return super().step(closure)
        finally:
            for parameter, gradient in asleep:  # DeepSpeed keeps these tensors where the optimizer is in main memory, and drops them itself where it is not
                parameter.grad = gradient


class ShardedOptimizer:
    """The optimizers of all engines as the one that the update knows."""

    def __init__(self, engines: list[Any], inner: list[ShardAdamW], stage: int, trained: list[nn.Parameter]) -> None:
        self.engines, self.inner, self.stage, self.trained = engines, inner, stage, trained
        self.afterwards: list[Callable[..., Any]] = []

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Every group, whose `lr` counts."""
        return [group for optimizer in self.inner for group in optimizer.param_groups]

    def step(self) -> None:
        """One step of every engine."""
        for engine in self.engines:
            engine.step()
        for hook in self.afterwards:
            hook(self)

    def register_step_post_hook(self, hook: Callable[..., Any]) -> None:
        """Call `hook` after every step, as torch's optimizers do."""
        self.afterwards.append(hook)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients. At ZeRO-3 a share that gets none in the first pass of a step would add to what an earlier step left."""
        for engine in self.engines:
            engine.optimizer.zero_grad(set_to_none=set_to_none)
            added = getattr(engine.optimizer, "all_grad_tensors", {})  # what ZeRO-2 adds up until the last pass of a step
            added.update(dict.fromkeys(added))
            forget_offloaded(engine.optimizer, self.stage)
        if self.stage == 3:
            from deepspeed.utils import safe_set_local_grad

            for parameter in self.trained:
                safe_set_local_grad(parameter, torch.zeros_like(parameter.ds_tensor, dtype=torch.float32))  # type: ignore[attr-defined]

    def sleep(self, of: str, asleep: bool) -> None:
        """Let the policy's or the value function's group sleep, or wake it."""
        for group in self.param_groups:
            if group["of"] == of:
                group["asleep"] = asleep

    def _shares(self) -> Iterator[tuple[str, Tensor, dict[str, Tensor]]]:
        """Each flat share of parameters by a name, itself, and the state that AdamW has of it."""
        for number, (engine, optimizer) in enumerate(zip(self.engines, self.inner, strict=True)):
            found = engine.optimizer.fp32_partitioned_groups_flat if self.stage == 3 else engine.optimizer.single_partition_of_fp32_groups
            for index, flat in enumerate(found):
                yield f"{number}.{index}", flat, optimizer.state[flat]

    def shard(self) -> dict[str, Tensor]:
        """This process's share of the state, in main memory."""
        return {f"{share}.{name}": value.detach().to("cpu", copy=True) for share, _, state in self._shares() for name, value in state.items()}

    def load_shard(self, tensors: dict[str, Tensor]) -> None:
        """Go on from what `shard` gave.

        Raises:
            UserError: it is of other parameters.
        """
        found: dict[str, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            share, _, name = key.rpartition(".")
            found.setdefault(share, {})[name] = value
        shares = {share: (flat, state) for share, flat, state in self._shares()}
        if not found.keys() <= shares.keys():
            raise UserError(f"the save holds optimizer shares {sorted(found)}, this run has {sorted(shares)}; continue with the machine file that it was made with")
        for share, state in found.items():
            flat, now = shares[share]
            fused = self.inner[0].defaults.get("fused")  # then AdamW's count of steps lies where the parameter does, else in main memory
            now.update({name: value.to(flat.device) if fused or name != "step" else value for name, value in state.items()})
        self.zero_grad()


def forget_offloaded(optimizer: Any, stage: int) -> None:
    """Zero what DeepSpeed adds gradients up in where its optimizer is in main memory: a parameter that a pass leaves out would get what an earlier step left."""
    if not (optimizer.offload_optimizer if stage == 3 else optimizer.cpu_offload):
        return
    arrived()
    if stage == 3:
        optimizer.grad_partitions_flat_buffer.zero_()
        return
    optimizer.micro_step_id = -1  # as after a step: where none was taken, the next pass would add to what is there
    for gradient in (*optimizer.accumulated_grads_in_cpu.values(), *(flat.grad for flat in optimizer.single_partition_of_fp32_groups)):
        gradient.zero_()


def arrived() -> None:
    """Wait for the device: it copies gradients into page-locked memory without anybody waiting for them."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().synchronize()


def shard_adamw(groups: list[dict[str, Any]], **arguments: Any) -> ShardAdamW:
    """An optimizer of such groups, all awake."""
    return ShardAdamW([group | {"asleep": False} for group in groups], **arguments)
