"""Validation rows that stand in the training rows as well, word for word or nearly: their loss says nothing about new prompts."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from importlib.util import find_spec
from typing import NamedTuple

from stages.data.rows import Demonstration

SHINGLE = 3  # words
SIMILAR = 0.9  # Jaccard similarity of two rows' shingles from which on they are nearly the same
PERMUTATIONS = 64
NEAR_ROWS = 50_000  # training rows among which near duplicates are looked for (about 0.2 ms each); exact ones are looked for among all


class Duplicates(NamedTuple):
    """Validation rows that repeat a training row, ascending: numbers of rows, from 0. `near` do so nearly; None where that was not looked for."""

    exact: list[int]
    near: list[int] | None


def words(row: Demonstration) -> list[str]:
    """The words of all turns, without case and punctuation."""
    text = unicodedata.normalize("NFKC", "\n".join(f"{message.content} {message.extra}" for message in row.messages)).casefold()
    return re.findall(r"\w+", text) or text.split()


def shingles(row: Demonstration) -> frozenset[str]:
    """Every SHINGLE words in a row; of a shorter row, all of it."""
    found = words(row)
    return frozenset(" ".join(found[i : i + SHINGLE]) for i in range(max(1, len(found) - SHINGLE + 1)))


def similarity(one: frozenset[str], other: frozenset[str]) -> float:
    """Jaccard similarity: shingles of both over shingles of either."""
    return len(one & other) / max(1, len(one | other))


def find(train: Sequence[Demonstration], validation: Sequence[Demonstration]) -> Duplicates:
    """Look every validation row up among the training rows.

    Near ones need datasketch: MinHash signatures of shingles (Broder 1997) find candidates, whose similarity is then computed exactly.
    """
    known = {tuple(words(row)) for row in train}
    exact = [i for i, row in enumerate(validation) if tuple(words(row)) in known]
    if find_spec("datasketch") is None:
        return Duplicates(exact, None)
    return Duplicates(exact, sorted(_near(train[:NEAR_ROWS], {i: shingles(row) for i, row in enumerate(validation) if i not in set(exact)})))


def _near(train: Sequence[Demonstration], wanted: dict[int, frozenset[str]]) -> list[int]:
    from datasketch import MinHash, MinHashLSH

    def signature(found: frozenset[str]) -> MinHash:
        made = MinHash(num_perm=PERMUTATIONS, seed=1)
        made.update_batch([shingle.encode() for shingle in sorted(found)])
        return made

    index = MinHashLSH(threshold=SIMILAR - 0.1, num_perm=PERMUTATIONS)  # candidates: rather too many than too few
    for number, found in wanted.items():
        index.insert(number, signature(found))
    near: set[int] = set()
    for row in train:
        found = shingles(row)
        near |= {n for n in index.query(signature(found)) if n not in near and similarity(wanted[n], found) >= SIMILAR}
    return list(near)
