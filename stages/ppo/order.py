"""The order in which rows are used: an endless stream of seeded permutations, a function of position alone."""

from __future__ import annotations

import torch

_cache: dict[tuple[int, int, int], list[int]] = {}


def stream(count: int, first: int, length: int, seed: int) -> list[int]:
    """Row numbers (0 … count - 1) at positions first … first + length - 1: every pass uses each row once, so any count fits any length."""
    picked = []
    for position in range(first, first + length):
        epoch, offset = divmod(position, count)
        picked.append(_permutation(count, seed, epoch)[offset])
    return picked


def _permutation(count: int, seed: int, epoch: int) -> list[int]:
    key = (count, seed, epoch)
    if key not in _cache:
        for old in [k for k in _cache if k[:2] == key[:2] and k[2] < epoch - 1]:
            del _cache[old]
        generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
        _cache[key] = torch.randperm(count, generator=generator).tolist()
    return _cache[key]
