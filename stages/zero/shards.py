"""DeepSpeed's own saves: a write that fails on one process leaves none waiting, and what is read back is data, not code."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from stages.zero.machine import uses_deepspeed

FORCED = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"  # torch: every torch.load takes tensors and allowed classes only, whatever its caller says


@contextmanager
def failures_kept(engine: Any) -> Iterator[list[Callable[[], None]]]:
    """While entered, `engine.save_checkpoint` comes to its end on every process although writes fail: it has barriers between them, at which
    the others would wait for one that has raised. Gives the failures, each as a function that raises it.

    It then neither writes `latest` nor copies the script that converts shards, of which no resume has any use.
    """
    failures: list[Callable[[], None]] = []
    writer = engine.checkpoint_engine

    def kept(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            try:
                return function(*arguments, **keywords)
            except (OSError, RuntimeError) as error:
                failures.append(partial(_raise, error))
                return None

        return call

    replaced = {writer: ("save", "makedirs"), engine: ("save_checkpoint", "_copy_recovery_script")}
    own = {(thing, name): thing.__dict__.get(name) for thing, names in replaced.items() for name in names}
    writer.save, writer.makedirs = kept(writer.save), kept(writer.makedirs)
    engine.save_checkpoint = partial(engine.save_checkpoint, save_latest=False)
    engine._copy_recovery_script = lambda *_: None
    try:
        yield failures
    finally:
        for (thing, name), before in own.items():
            if before is None:
                delattr(thing, name)
            else:
                setattr(thing, name, before)


def _raise(error: Exception) -> None:
    raise error


@contextmanager
def data_only() -> Iterator[None]:
    """While entered, pickles are read as tensors and plain values, under DeepSpeed with the few classes of its own that its shards name."""
    if not uses_deepspeed():
        yield
        return
    before = os.environ.get(FORCED)
    os.environ[FORCED] = "1"
    try:
        with torch.serialization.safe_globals(allowed()):
            yield
    finally:
        if before is None:
            del os.environ[FORCED]
        else:
            os.environ[FORCED] = before


def allowed() -> list[Any]:
    """The classes of DeepSpeed's that its shards hold, none of which does anything when it is made."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]
