"""Where in the backward pass a simulation is: phases whose peaks are linear in the number of layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from launch.plan.simulate import Simulation


@contextmanager
def marked(running: Simulation, model: nn.Module, layers: int) -> Iterator[None]:
    """Within the block the backward pass is three phases: head, layers, and the first layer with the embeddings.

    Each of them is reached at one instant at any depth, so that its peak is linear in the number of layers.
    """
    handles = []
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == layers and layers > 1:
            handles += [_at_backward(running, module[-1], "layers"), _at_backward(running, module[0], "embeddings")]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _at_backward(running: Simulation, layer: nn.Module, name: str) -> Any:
    """Begin a phase when the gradient of a layer's output is there."""

    def forward(_module: Any, _args: Any, out: Any) -> None:
        tensor = out[0] if isinstance(out, tuple) else out
        if isinstance(tensor, Tensor) and tensor.requires_grad:
            tensor.register_hook(lambda _: running.begin(f"{running.phase.partition(':')[0]}: {name}"))

    return layer.register_forward_hook(forward)
