"""Attention kernels that need a GPU and 16-bit numbers, in a model that may still lie in main memory in float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def is_flash(model: Any) -> bool:
    """Whether a model's attention is one of the flash kernels."""
    return "flash" in str(getattr(model.config, "_attn_implementation", "") or "")


@contextmanager
def computed_anywhere(model: Any) -> Iterator[None]:
    """Within the block a model computes on any device and in any precision: its attention is transformers' own where its kernel is a flash one.

    For what is found out about a model before it is trained and has nothing to do with its kernel.
    """
    config = model.config
    if not is_flash(model):
        yield
        return
    kernel, config._attn_implementation = config._attn_implementation, "eager"
    try:
        yield
    finally:
        config._attn_implementation = kernel
