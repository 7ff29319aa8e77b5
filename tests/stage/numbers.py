"""Numbers that go bad at a chosen optimizer step, in any stage that TRL trains: injected where they come from."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import TrainerCallback

from stages.guard.skip import innermost
from stages.training import resume
from stages.training.ranks import rank

KINDS = ("batch", "gradient", "weight", "spike")


class Recorder(TrainerCallback):
    """Weights and the optimizer's state after every optimizer step, and those it began with as step 0."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.steps = [self.now()]

    def now(self) -> tuple[list[torch.Tensor], Any]:
        """Copies of this process's."""
        weights = [getattr(p, "ds_tensor", p).detach().clone() for p in self.trainer.model.parameters() if p.requires_grad]
        optimizer = innermost(self.trainer.optimizer) if self.trainer.optimizer is not None else None
        entries = list(optimizer.state.values()) if optimizer is not None else []  # not its state_dict: under ZeRO-3 it has groups of other parameters
        return weights, {i: {name: torch.as_tensor(value).clone() for name, value in entry.items()} for i, entry in enumerate(entries)}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep them."""
        self.steps.append(self.now())


def same(one: tuple[list[torch.Tensor], Any], other: tuple[list[torch.Tensor], Any]) -> bool:
    """Whether two recorded steps are equal to the bit."""
    states = one[1].keys() == other[1].keys() and all(torch.equal(v, other[1][i][k]) for i in one[1] for k, v in one[1][i].items())
    return states and all(torch.equal(a, b) for a, b in zip(one[0], other[0], strict=True))


@contextmanager
def injected(kind: str, steps: Collection[int], on_rank: int | None = None) -> Iterator[list[Recorder]]:
    """Within the block a stage's trainer meets `kind` in the optimizer steps `steps` (from 1), on one rank or on all.

    batch: what the first layer makes of it is NaN; gradient: that of one parameter is; weight: one parameter is, from then on; spike: the
    loss is ten thousand times what it should be. Yields a list that gets what is recorded of each run.
    """
    train, recorded = resume.train, []

    def armed(trainer: Any, *arguments: Any, **keywords: Any) -> None:
        if on_rank is None or rank() == on_rank:
            arm(trainer, kind, steps)
        recorded.append(Recorder(trainer))
        trainer.add_callback(recorded[-1])
        train(trainer, *arguments, **keywords)

    resume.train = armed
    try:
        yield recorded
    finally:
        resume.train = train


def arm(trainer: Any, kind: str, steps: Collection[int]) -> None:
    """Set the fault."""
    met: set[int] = set()

    def due() -> bool:
        return trainer.model.training and trainer.state.global_step + 1 in steps

    trained = next(p for p in trainer.model.parameters() if p.requires_grad)
    if kind == "batch":
        embeddings = trainer.model.get_input_embeddings()
        embeddings.register_forward_hook(lambda module, inputs, output: output * math.nan if due() else output)
    elif kind == "gradient":
        trained.register_hook(lambda gradient: torch.full_like(gradient, math.nan) if due() else gradient)
    elif kind == "spike":
        below = type(trainer).__mro__[1]  # TRL's trainer, below the guard
        compute = below.compute_loss

        class Spiked(below):  # type: ignore[valid-type, misc]
            def compute_loss(self, *arguments: Any, **keywords: Any) -> Any:
                found = compute(self, *arguments, **keywords)
                factor = 1e4 if due() else 1.0
                return (found[0] * factor, *found[1:]) if isinstance(found, tuple) else found * factor

        type(trainer).__bases__ = (Spiked,)
    else:
        compute_loss = trainer.compute_loss

        def broken(*arguments: Any, **keywords: Any) -> Any:
            if due() and trainer.state.global_step not in met:
                met.add(trainer.state.global_step)
                with torch.no_grad():
                    trained.fill_(math.nan)  # of ZeRO-3 what small ones have whole on every process
                    getattr(trained, "ds_tensor", trained).fill_(math.nan)
            return compute_loss(*arguments, **keywords)

        trainer.compute_loss = broken
