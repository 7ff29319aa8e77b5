"""What a reward model's margins say about preference pairs, and the best that a shortcut does on the same pairs. Pure numpy.

The Bradley-Terry model: P(chosen wins) = σ(margin), margin = score of chosen - score of rejected.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from rewards.protocol import text_of
from rewards.rules import repeated_share

Margins = npt.ArrayLike


class BradleyTerry(NamedTuple):
    """Quality of margins [N] on pairs."""

    accuracy: float
    ece: float
    margin: float  # mean
    loss: float  # mean -log σ(margin), nats
    n: int


def bradley_terry(margins: Margins) -> BradleyTerry:
    """Accuracy, calibration, mean margin and loss of margins [N]. Raises ValueError when there is none."""
    values = _margins(margins)
    return BradleyTerry(
        pair_accuracy(values), expected_calibration_error(values), float(values.mean()), float(np.logaddexp(0, -values).mean()), len(values)
    )


def pair_accuracy(margins: Margins) -> float:
    """Share of pairs whose chosen completion scores higher, each pair counted once; a tie counts one half."""
    values = _margins(margins)
    return float(((values > 0) + 0.5 * (values == 0)).mean())


def expected_calibration_error(margins: Margins, bins: int = 10) -> float:
    """Σ over bins of (share of pairs) · |accuracy - mean confidence| (Guo et al. 2017, arXiv:1706.04599).

    Every pair's outcome is "chosen wins", so confidence is folded: max(σ(m), σ(-m)), from 0.5 to 1, in bins of equal width;
    the model is right where m > 0, half right at 0.
    """
    values = _margins(margins)
    confidence = 1 / (1 + np.exp(-np.abs(values)))
    right = (values > 0) + 0.5 * (values == 0)
    index = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    gaps = [(index == b).mean() * abs(right[index == b].mean() - confidence[index == b].mean()) for b in np.unique(index)]
    return float(sum(gaps))


def _margins(margins: Margins) -> npt.NDArray[np.float64]:
    values = np.asarray(margins, dtype=np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"margins have shape {values.shape}; expected one per pair, and at least one")
    return values


def _words(text: str) -> list[str]:
    return [word.strip(string.punctuation) for word in text.casefold().split()]


def _overlap(prompt: str, completion: str) -> float:
    """Share of the completion's words that stand in the prompt."""
    words, asked = _words(completion), set(_words(prompt))
    return sum(word in asked for word in words) / len(words) if words else 0.0


def _first_word(prompt: str, completion: str) -> float:
    words = _words(completion)
    return float(bool(words) and words[0] in set(_words(prompt)))


# name -> (feature of (prompt, completion), what it is called when more of it wins, and when less wins)
SHORTCUTS: dict[str, tuple[Callable[[str, str], float], str, str]] = {
    "length": (lambda p, c: len(c.split()), "longer wins", "shorter wins"),
    "characters": (lambda p, c: len(c), "more characters win", "fewer characters win"),
    "repetition": (lambda p, c: repeated_share(c, 2), "more repetition wins", "less repetition wins"),
    "overlap": (_overlap, "more words of the prompt win", "fewer words of the prompt win"),
    "first_word": (_first_word, "first word in the prompt wins", "first word not in the prompt wins"),
    "punctuation": (lambda p, c: sum(x in string.punctuation for x in c), "more punctuation wins", "less punctuation wins"),
    "digits": (lambda p, c: sum(x.isdigit() for x in c), "more digits win", "fewer digits win"),
    "capitals": (lambda p, c: sum(x.isupper() for x in c), "more capitals win", "fewer capitals win"),
    "sentences": (lambda p, c: sum(x in ".!?" for x in c), "more sentences win", "fewer sentences win"),
}


def shortcut_baselines(train: Sequence[Any], held_out: Sequence[Any]) -> dict[str, float]:
    """Accuracy on held-out pairs of rules that do not read the answer; which way each rule goes is fitted on the training pairs.

    Pairs have .prompt (text or messages), .chosen and .rejected. Returns {"longer wins": 0.61, …}; a tie counts one half. The
    best of them on the held-out pairs is what a reward model has to beat. Raises ValueError without pairs.
    """
    baselines = {}
    for feature, more, less in SHORTCUTS.values():
        fitted = pair_accuracy([_difference(feature, pair) for pair in train])
        accuracy = pair_accuracy([_difference(feature, pair) for pair in held_out])
        baselines[more if fitted >= 0.5 else less] = accuracy if fitted >= 0.5 else 1 - accuracy
    return baselines


def best_shortcut(baselines: dict[str, float]) -> tuple[str, float]:
    """The shortcut with the highest accuracy, and that accuracy."""
    return max(baselines.items(), key=lambda item: item[1])


def _difference(feature: Callable[[str, str], float], pair: Any) -> float:
    prompt = text_of(pair.prompt)
    return feature(prompt, text_of(pair.chosen)) - feature(prompt, text_of(pair.rejected))
