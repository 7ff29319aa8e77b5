"""Bits flipped and files cut short in a published checkpoint, in place, one at a time, each put right again."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from stages.registry import Checkpoint, Registry
from stages.registry.integrity import check, walk
from tests.faults.scenarios import writer


def small(root: Path) -> Checkpoint:
    """A checkpoint of a few thousand bytes."""
    return Registry(root).publish("sft", "demo", writer(1.0))


def large(root: Path, size: int, seed: int) -> Checkpoint:
    """One with `size` bytes of weights in one file."""
    weights = np.random.default_rng(seed).standard_normal(size // 4, dtype=np.float32)

    def write(folder: Path) -> None:
        save_file({"weight": weights}, folder / "model.safetensors")
        (folder / "config.json").write_text("{}")

    return Registry(root).publish("sft", "large", write)


def files(checkpoint: Checkpoint) -> list[Path]:
    """All of them, the manifest too."""
    return [checkpoint.path / name for name, _ in walk(checkpoint.path)]


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """A handle to write with, although a published file is read-only."""
    mode = path.stat().st_mode
    path.chmod(mode | 0o200)
    handle = os.open(path, os.O_RDWR)
    try:
        yield handle
    finally:
        os.close(handle)
        path.chmod(mode)


def found(checkpoint: Checkpoint, handle: int, position: int, bit: int) -> bool:
    """Whether the deep check finds one flipped bit, which is flipped back afterwards."""
    byte = os.pread(handle, 1, position)
    os.pwrite(handle, bytes([byte[0] ^ 1 << bit]), position)
    try:
        return check(checkpoint.path, deep=True) != []
    finally:
        os.pwrite(handle, byte, position)


def every_bit(checkpoint: Checkpoint, every: int = 1) -> tuple[int, list[str]]:
    """Flips tried, and those that were missed: each of the eight bits of every byte (of every `every`-th)."""
    tried, missed = 0, []
    for path in files(checkpoint):
        with opened(path) as handle:
            for position in range(0, path.stat().st_size, every):
                for bit in range(8):
                    tried += 1
                    if not found(checkpoint, handle, position, bit):
                        missed.append(f"{path.name} byte {position} bit {bit}")
    return tried, missed


def random_bits(checkpoint: Checkpoint, count: int, seed: int) -> tuple[int, list[str]]:
    """Flips tried, and those that were missed, at random places of all files together; each time the whole checkpoint is hashed."""
    chance, missed = random.Random(seed), []
    there = files(checkpoint)
    sizes = [path.stat().st_size for path in there]
    for _ in range(count):
        path = chance.choices(there, sizes)[0]
        position, bit = chance.randrange(path.stat().st_size), chance.randrange(8)
        with opened(path) as handle:
            if not found(checkpoint, handle, position, bit):
                missed.append(f"{path.name} byte {position} bit {bit}")
    return count, missed


def truncations(checkpoint: Checkpoint, most: int, seed: int) -> tuple[int, list[str]]:
    """Lengths tried, and those that the quick check missed: every shorter length of each file, of a long one `most` at random, 0 and one less."""
    chance, tried, missed = random.Random(seed), 0, []
    for path in files(checkpoint):
        size = path.stat().st_size
        lengths = range(size) if size <= most else sorted({0, size - 1, *(chance.randrange(size) for _ in range(most))})
        with opened(path) as handle:
            for length in reversed(lengths):
                kept = os.pread(handle, size - length, length)
                os.ftruncate(handle, length)
                tried += 1
                if check(checkpoint.path) == []:
                    missed.append(f"{path.name} cut to {length}")
                os.pwrite(handle, kept, length)
    return tried, missed
