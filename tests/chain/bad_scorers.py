"""Scorers that misbehave."""

from __future__ import annotations

import os
from typing import Any


def raises(prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
    raise KeyError("order")


def too_few(prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
    return [1.0]


def not_a_number(prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
    return [float("nan")] * len(completions)


def words(prompts: list[Any], completions: list[Any], **_: Any) -> list[Any]:
    return ["good"] * len(completions)


def raises_on_rank_1(prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
    """Works in the first process only."""
    if os.environ.get("RANK") == "1":
        raise KeyError("order")
    return [0.0] * len(completions)
