"""Parameters that ZeRO-3 has split over the processes: their true shape, and ways to see them whole.

All functions work on ordinary parameters too. Those that gather are collectives: every rank calls them, in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn


def is_split(parameter: Any) -> bool:
    """Whether ZeRO-3 holds this tensor in parts, one per process; it is empty ([0]) outside of a gather."""
    return hasattr(parameter, "ds_id")


def shape(parameter: Any) -> torch.Size:
    """The shape of the whole parameter."""
    return parameter.ds_shape if is_split(parameter) else parameter.shape


def whole(parameters: Iterable[Any], *, changed: bool = False) -> AbstractContextManager[Any]:
    """A context in which `parameters` are whole on every rank; a collective.

    `changed`: every rank changes them alike; rank 0's values are split again when the context ends. Otherwise changes are lost.
    """
    split = list({id(p): p for p in parameters if is_split(p)}.values())  # DeepSpeed mishandles one that is named twice
    if not split:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(split, modifier_rank=0 if changed else None)


@contextmanager
def forward_possible(model: nn.Module) -> Iterator[None]:
    """A context in which a model that no engine holds yet can be called (without gradients): each module's own parameters are
    whole while it computes, and no others. A call of the model is then a collective.
    """
    handles = []
    for module in model.modules():
        own = [p for p in module.parameters(recurse=False) if is_split(p)]
        if own:
            handles += _gathered_in_forward(module, own)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _gathered_in_forward(module: nn.Module, own: list[Any]) -> list[Any]:
    stack = ExitStack()

    def before(*_: Any) -> None:
        stack.enter_context(whole(own))

    def after(*_: Any) -> None:
        stack.close()

    return [module.register_forward_pre_hook(before), module.register_forward_hook(after, always_call=True)]


def state(model: nn.Module, keep: Callable[[str, Tensor], bool] | None = None) -> dict[str, Tensor] | None:
    """The model's state dict with whole tensors in main memory: on rank 0, None elsewhere. A collective.

    One tensor is gathered at a time, so that no process holds more of the model than it did plus the largest tensor. Tensors that share
    their values (tied embeddings) share them in the result. `keep(name, tensor)` false: that tensor is neither gathered nor returned.
    """
    first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    copies: dict[int, Tensor] = {}
    out = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if keep is not None and not keep(name, value):
            continue
        if id(value) not in copies:
            with whole([value]):
                # a copy: DeepSpeed lays parameters into one buffer, which a file of separate tensors can't be written from
                copies[id(value)] = value.detach().to("cpu", copy=True) if first else torch.empty(0)
        out[name] = copies[id(value)]
    return out if first else None
