"""Loading a model under ZeRO-3 so that no process ever holds all of it."""

from __future__ import annotations

from typing import Any

from stages.zero.machine import plugin

_announced: list[Any] = []  # transformers keeps a weak reference: what it looks at must live as long as models are loaded


def announce(*, bf16: bool) -> None:
    """Tell transformers what the machine file says, before the first model is loaded: `from_pretrained` then splits each parameter as it
    is made, where the ZeRO stage is 3 and `zero3_init_flag` is not false.

    `bf16`: the engine will compute in bf16, so the parts are bf16 (the optimizer keeps float32 of its own).
    """
    found = plugin()
    _announced.clear()
    if found is None:
        return
    found.set_mixed_precision("bf16" if bf16 else "no")
    if found.zero3_init_flag:
        found.set_deepspeed_weakref()
        _announced.append(found)
