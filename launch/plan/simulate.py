"""Running a stage's code on tensors without data, to see what it would allocate.

Floating-point tensors have shapes and no values (torch's FakeTensorMode); whole numbers and booleans are computed for real beside them,
because shapes depend on them: token ids, masks, row numbers. So the code of a stage runs as it is, in milliseconds, at any size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._pytree import tree_iter, tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

from launch.plan.allocations import Allocations

LARGEST_VALUES = 2**22  # numbers of a tensor whose values are computed
aten: Any = torch.ops.aten
DEVICE: Any = torch.ops.prim.device.default


class Simulation(Allocations):
    """Counts as `Allocations` does, and answers what code asks of values: the true one where it is known, else 1.0, 1 or True."""

    def __init__(self) -> None:
        super().__init__()
        self.values = WeakTensorKeyDictionary()
        self.lets_gradients_go = False  # as they come, rather than adding them up

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is DEVICE:  # asked of a tensor at every step, half of all that is dispatched; nothing is allocated
            return args[0].fake_device if isinstance(args[0], FakeTensor) else func(*args)
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default:
            return self._scalar(args[0])
        if func is aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1]):
            args = (args[0], self._as_numbers(args[1]))
        elif func in (aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default):
            args = (args[0], self._as_numbers(args[1]), *args[2:])
        elif func is aten.nonzero.default:
            with unset_fake_temporarily():
                numbers = self._value(args[0]).nonzero()
            return self._known(numbers)
        out = super().__torch_dispatch__(func, types, args, kwargs)
        outputs = [value for value in tree_iter(out) if isinstance(value, Tensor)]
        if outputs and not any(value.is_floating_point() or value.numel() > LARGEST_VALUES for value in outputs):
            self._follow(func, args, kwargs, outputs)
        return out

    def _value(self, tensor: Tensor) -> Tensor:
        """The values of a tensor, all 1 where they are not known."""
        if not isinstance(tensor, FakeTensor):
            return tensor
        found = self.values.get(tensor)
        if found is None:
            with unset_fake_temporarily():
                found = torch.ones(tensor.shape, dtype=tensor.dtype)
        return found

    def _scalar(self, tensor: Tensor) -> Any:
        with unset_fake_temporarily():
            return self._value(tensor).item()

    def _known(self, value: Tensor) -> Tensor:
        """A tensor without data that has these values."""
        out = torch.empty_like(value, device="cpu")
        self.see(out)
        self.values[out] = value
        return out

    def _as_numbers(self, indices: Any) -> list[Any]:
        """Boolean masks of an index as row numbers: how many they are decides the shape."""
        found: list[Any] = []
        for index in indices:
            if index is None or index.dtype != torch.bool:
                found.append(index)
                continue
            with unset_fake_temporarily():
                numbers = self._value(index).nonzero(as_tuple=True)
            found += [self._known(each) for each in numbers]
        return found

    def _follow(self, func: Any, args: Any, kwargs: Any, outputs: list[Tensor]) -> None:
        """Compute an operation on the values too, where all that it reads is known."""
        inputs = [value for value in tree_iter((args, kwargs)) if isinstance(value, Tensor)]
        if any(isinstance(value, FakeTensor) and value not in self.values for value in inputs):
            for out in outputs:
                self.values.pop(out, None)  # perhaps written to from what is not known
            return
        with unset_fake_temporarily():
            real_args, real_kwargs = tree_map_only(Tensor, self._value, (args, kwargs))
            result = func(*real_args, **{key: value for key, value in real_kwargs.items() if key != "device"})
        for out, value in zip(outputs, (v for v in tree_iter(result) if isinstance(v, Tensor)), strict=True):
            self.values[out] = value


def _converted(module: nn.Module, convert: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """`nn.Module._apply` for tensors without data: a converted parameter is a new one (torch would swap the two, which weak references forbid)."""
    for child in module.children() if recurse else ():
        _converted(child, convert)
    for key, parameter in module._parameters.items():
        if parameter is not None and (found := convert(parameter.detach())).dtype != parameter.dtype:
            module._parameters[key] = nn.Parameter(found, requires_grad=parameter.requires_grad)
    for key, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[key] = convert(buffer)
    return module


@contextmanager
def simulation() -> Iterator[Simulation]:
    """Within the block tensors have no data, and the simulation counts them."""
    with mock.patch.object(nn.Module, "_apply", _converted), FakeTensorMode(allow_non_fake_inputs=True), Simulation() as running:
        yield running
