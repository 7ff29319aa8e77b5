"""Loading a model under ZeRO-3 so that no process ever holds all of it."""

from __future__ import annotations

from typing import Any

from configs.schema import Train
from stages.models import uses_bf16
from stages.training.ranks import world_size
from stages.zero.machine import check_settings, plugin, refuse_fsdp

_announced: list[Any] = []  # transformers keeps a weak reference: what it looks at must live as long as models are loaded


def announce(train: Train) -> None:
    """Tell transformers what the machine file says, before the first model is loaded: `from_pretrained` then splits each parameter as it
    is made, where the ZeRO stage is 3 and `zero3_init_flag` is not false.

    Where the engine will compute in bf16 the parts are bf16 (the optimizer keeps float32 of its own).

    Raises:
        UserError: the machine file states what is the stage's to decide, and otherwise; or it asks for FSDP.
    """
    refuse_fsdp()
    bf16 = uses_bf16(train.precision)
    check_settings(train, bf16=bf16, processes=world_size())
    found = plugin()
    _announced.clear()
    if found is None:
        return
    found.set_mixed_precision("bf16" if bf16 else "no")
    if found.zero3_init_flag:
        found.set_deepspeed_weakref()
        _announced.append(found)


def withdraw() -> None:
    """Take back what an earlier stage of this process has told: models that are loaded from now on are whole, and who wants them split does it (PPO)."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    _announced.clear()
    unset_hf_deepspeed_config()
