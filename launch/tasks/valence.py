"""Valence: how kind or happy a text sounds to a word list. A gold scorer that needs no model."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from rewards.protocol import text_of


@functools.lru_cache(maxsize=1)
def _analyser() -> Any:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


def valence(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
    """VADER compound valence of each completion (Hutto and Gilbert 2014), from -1 to 1; 0 for a text without valenced words.

    Its limits as a gold for politeness: it hears words ("stupid", "please"), not manners, and is 0 for most short factual
    answers. On the pairs of polite.yaml it sides with the polite answer in 28 % of the pairs, with the impolite one in 11 %,
    and cannot tell in 61 %.
    """
    return [float(_analyser().polarity_scores(text_of(completion))["compound"]) for completion in completions]
