"""What tensors a piece of code keeps alive: bytes by kind, at every instant and at the peak.

The same tracker follows a real run, to measure it, and a simulated one on tensors without data (launch/plan/simulate.py), to predict it.
It sees every operation of the thread it is entered in, backward passes on a CPU included, and counts each storage once from when an operation
first returns or reads it until it is freed. What it can't see: scratch space inside an operation, other threads until their tensors are read,
and memory that is not torch's.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

ACTIVATIONS = "activations"


@dataclass
class Peak:
    """The highest sum, what it was made of, and the operation that reached it."""

    total: int = 0  # bytes
    parts: dict[str, int] = field(default_factory=dict)  # kind -> bytes
    operation: str = ""


class Allocations(TorchDispatchMode):
    """Counts the storages that are alive, by kind. Enter it before anything is allocated.

    `kind_of(tensor)` names the kind of a storage when it is first seen; None leaves it to `default`. `answers` gives what operations that
    depend on data (`.item()`) return where tensors hold none.
    """

    def __init__(self, kind_of: Callable[[Tensor], str | None] | None = None, *, answers: bool = False) -> None:
        super().__init__()
        self.kind_of, self.answers = kind_of, answers
        self.default = ACTIVATIONS
        self.alive: dict[int, tuple[weakref.ref[Any], int, str]] = {}
        self.parts: dict[str, int] = {}
        self.total = 0
        self.peaks: dict[str, Peak] = {}
        self.phase = "start"

    def hold(self, kind: str, size: int) -> None:
        """Count `size` more bytes of a kind that no tensor stands for; fewer where negative."""
        self.parts[kind] = self.parts.get(kind, 0) + size
        self.total += size
        if size > 0:
            self._look("hold")

    def see(self, tensor: Tensor, kind: str | None = None) -> None:
        """Count a tensor's storage, where it is not counted yet; with `kind`, count it as that from now on."""
        if tensor.device.type == "meta" or tensor.layout != torch.strided:
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        known = self.alive.get(key)
        if known is not None and known[1] == size and kind in (None, known[2]):
            return
        if known is not None:
            kind = kind or known[2]
            self._gone(key)
        elif kind is None:
            kind = (self.kind_of(tensor) if self.kind_of is not None else None) or self.default
        self.alive[key] = (weakref.ref(storage, partial(self._freed, key)), size, kind)
        self.parts[kind] = self.parts.get(kind, 0) + size
        self.total += size

    def label(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Count the storages of `tensors` as `kind`."""
        for tensor in tensors:
            self.see(tensor, kind)

    def begin(self, phase: str) -> None:
        """What follows belongs to `phase`, whose peak starts at what is alive now."""
        self.phase = phase
        self._look(phase)

    def _freed(self, key: int, _: Any) -> None:
        self._gone(key)

    def _gone(self, key: int) -> None:
        found = self.alive.pop(key, None)
        if found is not None:
            self.parts[found[2]] -= found[1]
            self.total -= found[1]

    def _look(self, operation: str) -> None:
        peak = self.peaks.get(self.phase)
        if peak is None or self.total > peak.total:
            self.peaks[self.phase] = Peak(self.total, dict(self.parts), operation)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in tree_iter((args, kwargs)):
            if isinstance(value, Tensor):
                self.see(value)
        if self.answers and func is torch.ops.aten._local_scalar_dense.default:
            return {torch.bool: True}.get(args[0].dtype, 1.0 if args[0].is_floating_point() else 1)
        out = func(*args, **(kwargs or {}))
        for value in tree_iter(out):
            if isinstance(value, Tensor):
                self.see(value)
        self._look(str(func))
        return out

    @property
    def highest(self) -> Peak:
        """The peak of all phases."""
        return max(self.peaks.values(), key=lambda peak: peak.total, default=Peak())
