"""Soft prompts: prompt tuning, P-tuning and prefix tuning, trained by SFT and kept under every model that descends from it.

They can't be merged into weights, so they are stacked: a frozen prompt is put at the trunk of a model (`prompt`), everything above it sees the
positions of the text alone, and a checkpoint keeps it as a peft folder beside the weights under it (`folder`).
"""

from stages.soft.folder import (
    BASE,
    ENCODER,
    attach,
    beneath,
    described,
    is_prompt,
    put_aside,
    same_prompt,
    virtual_tokens,
)
from stages.soft.possible import check, refuse_merge
from stages.soft.prompt import SoftPrompt, of, put_at, room, take_off

__all__ = ["BASE", "ENCODER", "SoftPrompt", "attach", "beneath", "check", "described", "is_prompt", "of", "put_aside", "put_at", "refuse_merge", "room", "same_prompt", "take_off", "virtual_tokens"]
