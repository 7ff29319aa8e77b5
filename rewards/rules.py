"""Scorers that need no model: length, repetition, a regular expression, keywords.

A word is what whitespace separates. Every rule takes plain text or message lists and returns one float per completion.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from configs.errors import UserError
from rewards.protocol import Text, text_of


@dataclass(frozen=True)
class Length:
    """0 at `target` words, falling linearly to -1 at no word or at twice the target, never lower."""

    target: int

    @property
    def name(self) -> str:
        return f"length:{self.target}"

    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text], **columns: Any) -> list[float]:
        return [-min(1.0, abs(len(text_of(c).split()) - self.target) / self.target) for c in completions]


def repeated_share(text: str, ngram: int) -> float:
    """Share of the word n-grams (compared without case) that stood in the text before; 0 in a text too short to have one."""
    words = text.casefold().split()
    grams = [tuple(words[i : i + ngram]) for i in range(len(words) - ngram + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


@dataclass(frozen=True)
class Repetition:
    """Minus the share of repeated word n-grams, from 0 to -1."""

    ngram: int = 2

    @property
    def name(self) -> str:
        return f"repetition:{self.ngram}"

    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text], **columns: Any) -> list[float]:
        return [-repeated_share(text_of(c), self.ngram) for c in completions]


class Regex:
    """1 where the pattern is found in the completion, else 0. Raises UserError for a pattern that does not compile."""

    def __init__(self, pattern: str) -> None:
        self.name = f"regex:{pattern}"
        try:
            self._compiled = re.compile(pattern)
        except re.error as error:
            raise UserError(f"scorer {self.name}: not a Python regular expression: {error}") from error

    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text], **columns: Any) -> list[float]:
        return [1.0 if self._compiled.search(text_of(c)) else 0.0 for c in completions]


class Keyword:
    """Share of the words (or phrases) that occur in the completion as whole words, compared without case."""

    def __init__(self, words: Sequence[str]) -> None:
        self.name = f"keyword:{','.join(words)}"
        if not words or not all(word.strip() for word in words):
            raise UserError(f"scorer {self.name}: has an empty word; give the words to look for")
        # Not \b: it would never match next to a word that starts or ends with punctuation, such as "C++".
        self._patterns = [re.compile(rf"(?<!\w){re.escape(word.strip().casefold())}(?!\w)") for word in words]

    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text], **columns: Any) -> list[float]:
        texts = [text_of(c).casefold() for c in completions]
        return [sum(bool(pattern.search(text)) for pattern in self._patterns) / len(self._patterns) for text in texts]
