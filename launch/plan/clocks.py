"""Seconds of the parts of a running stage's steps."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock


def now() -> float:
    """Seconds on a clock, once all that was asked of a GPU has been done."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()  # else the clock stops when the work has been asked for
    return time.monotonic()


@contextmanager
def timed(owner: Any, name: str, times: list[float]) -> Iterator[None]:
    """Within the block the seconds of each call of `owner.name` go into `times`."""
    original = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        began = now()
        out = original(*args, **kwargs)
        times.append(now() - began)
        return out

    with mock.patch.object(owner, name, call):
        yield


@contextmanager
def step_times(stage: str, times: list[float]) -> Iterator[None]:
    """Within the block the seconds of each micro-step (PPO: of each iteration) go into `times`."""
    if stage == "ppo":
        with timed(importlib.import_module("stages.ppo.train"), "run_iteration", times):
            yield
    else:
        with timed(importlib.import_module("transformers").Trainer, "training_step", times):
            yield


@contextmanager
def optimizer_steps(found: list[dict[str, float]], begin: Callable[[], None]) -> Iterator[None]:
    """Within the block {"first", "whole"} of each optimizer step go into `found`: seconds of its first micro-step, and of all of it, from that
    micro-step's begin until its gradients are cleared. `begin` is called before each."""
    from transformers import Trainer
    from transformers.trainer_callback import CallbackHandler

    training_step, on_step_end = Trainer.training_step, CallbackHandler.on_step_end
    began: list[float] = []
    firsts: list[float] = []

    def micro(*args: Any, **kwargs: Any) -> Any:
        if not began:
            begin()
        began.append(now())
        out = training_step(*args, **kwargs)
        firsts.append(now() - began[-1])
        return out

    def ended(*args: Any, **kwargs: Any) -> Any:
        out = on_step_end(*args, **kwargs)
        found.append({"first": firsts[0], "whole": now() - began[0]})
        began.clear()
        firsts.clear()
        return out

    with mock.patch.object(Trainer, "training_step", micro), mock.patch.object(CallbackHandler, "on_step_end", ended):
        yield


@contextmanager
def iterations(found: list[dict[str, float]], begin: Callable[[], None]) -> Iterator[None]:
    """Within the block {"rollout", "scoring", "update", "optimizer"} of each iteration of PPO go into `found`: seconds; the optimizer's, with the
    exchange of gradients before it, are part of the update's. `begin` is called before each."""
    module = importlib.import_module("stages.ppo.train")
    run_iteration, update_policy = module.run_iteration, module.update_policy
    steps: list[float] = []

    def update(trained: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        with timed(trained, "settle", steps), timed(optimizer, "step", steps):
            return update_policy(trained, optimizer, *args, **kwargs)

    def iteration(*args: Any, **kwargs: Any) -> Any:
        begin()
        steps.clear()
        out = run_iteration(*args, **kwargs)
        found.append({part: out[0][f"time/{part}"] for part in ("rollout", "scoring", "update")} | {"optimizer": sum(steps)})
        return out

    with mock.patch.object(module, "update_policy", update), mock.patch.object(module, "run_iteration", iteration):
        yield
