"""Schema of training on from a checkpoint with new data: what `align sft --continue` adds to the config of its parent."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from configs.schema.common import Sources, Strict


class OldData(Strict):
    """Data that the parent, or one before it, was trained on: its held-out rows show what was forgotten."""

    of: str = Field(description="The checkpoint that was trained on it, such as sft/demo@3.")
    data: Sources = Field(description="Where that data lies.")
    validation: str | None = Field(default=None, description="Fingerprint of its validation rows at that time; others are measured too, and told to be others.")


class Continued(Strict):
    """What is trained on, and what it is compared on before and after."""

    adapter: Literal["same", "merged"] = Field(
        default="same", description="An adapter as init_from: train this adapter on over its base, or merge it into its base first. Whole weights are trained on either way."
    )
    old: list[OldData] = Field(default_factory=list, description="Earlier data, newest first; its validation rows are measured before and after.")
    plain_text: Path | None = Field(default=None, description="A text file: its perplexity before and after shows what was forgotten of the language itself.")
