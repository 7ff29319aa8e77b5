"""No randomness in a model's forward pass: what a rollout stored, an update must compute again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from configs.errors import UserError

NOT_OF_TRAINING = ("layerdrop", "layer_drop", "drop_path", "classifier", "summary", "token_dropout")  # names of rates that are not those of activations
TOLERANCE = 1e-3  # nats: kernels that add in another order each time differ by less, the least dropout by more


def _dropouts(model: nn.Module) -> Iterator[tuple[Any, str]]:
    """(owner, attribute) of every dropout that is on: nn.Dropout's p, and rates that a module or its config keeps as a number.

    Many architectures call `F.dropout(x, p=self.dropout)`; which name the number has is theirs to choose, so any with "drop" counts.
    """
    return ((owner, name) for owner, name, value in _all_dropouts(model) if value > 0)


def _all_dropouts(model: nn.Module) -> Iterator[tuple[Any, str, float]]:
    """(owner, attribute, rate) of every dropout, on or off."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            yield module, "p", module.p
        for owner in (module, getattr(module, "config", None)):
            for name, value in list(vars(owner).items()) if owner is not None else ():
                if "drop" in name.lower() and isinstance(value, float):
                    yield owner, name, value


def with_dropout(model: Any, rate: float) -> Any:
    """Set the model's own dropouts (all but those of heads, and those that drop layers) to `rate`; they act in training mode only.

    Raises:
        UserError: the architecture has none.
    """
    found = [(owner, name) for owner, name, _ in _all_dropouts(model) if not any(word in name.lower() for word in NOT_OF_TRAINING)]
    if not any(isinstance(owner, nn.Module) for owner, _ in found):
        raise UserError(f"train.dropout is {rate}, and {type(model).__name__} has no dropout of its own; leave it out (adapters have lora.dropout)")
    for owner, name in found:
        setattr(owner, name, rate)
    return model


def without_dropout(model: Any) -> Any:
    """Set every dropout to 0, in modules and configs, and switch to eval mode."""
    for owner, name in list(_dropouts(model)):
        setattr(owner, name, 0.0)
    model.eval()
    return model


@torch.no_grad()
def check_no_dropout(model: nn.Module, forward: Callable[[], Tensor]) -> None:
    """Make sure that `model` computes the same in training mode every time. `forward` runs it on a short row.

    Raises:
        UserError: two passes differ; the architecture draws random numbers where `without_dropout` does not reach.
    """
    left = [f"{type(owner).__name__}.{name}" for owner, name in _dropouts(model)]
    assert not left, f"dropout is on in {left[:3]}"  # adapters of zeros would hide it from the comparison
    was_training = model.training
    model.train()
    try:
        gap = (forward() - forward()).abs().max().item()
    finally:
        model.train(was_training)
    if not gap <= TOLERANCE:
        raise UserError(
            f"two forward passes in training mode differ by {gap:.3g}: this architecture has a dropout or noise that can't be switched off here, "
            "and PPO must compute in the update what it stored in the rollout; start from another model"
        )
