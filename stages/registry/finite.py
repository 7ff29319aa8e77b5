"""Are all weights numbers? Reads safetensors files directly: every float format, bfloat16 and float8 too, without torch."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from configs.errors import UserError

# dtype of safetensors -> (bytes, exponent bits): a float whose exponent bits are all ones is an infinity or a NaN
_EXPONENT = {
    "F64": (8, 0x7FF0000000000000),
    "F32": (4, 0x7F800000),
    "F16": (2, 0x7C00),
    "BF16": (2, 0x7F80),
    "F8_E5M2": (1, 0x7C),
    "F8_E4M3": (1, 0x7F),  # has no infinity and one NaN: all bits but the sign
}
_BLOCK = 2**24  # numbers looked at together


def nonfinite_tensors(file: Path) -> Iterator[tuple[str, int]]:
    """(tensor, how many of its numbers are NaN or infinite) for every tensor that has any. Raises UserError, OSError."""
    header, start = read_header(file)
    for name, entry in header.items():
        if name == "__metadata__" or entry["dtype"] not in _EXPONENT:
            continue
        if count := _count(file, entry["dtype"], start + entry["data_offsets"][0], start + entry["data_offsets"][1]):
            yield name, count


def read_header(file: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file and where its data begins (bytes). Raises UserError when the file is not whole."""
    size = file.stat().st_size
    try:
        with open(file, "rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(size, 10**8):
                raise ValueError("header longer than the file")
            header = json.loads(stream.read(length))
        end = max([entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"], default=0)
        if 8 + length + end != size:
            raise ValueError(f"the file has {size} bytes, its header speaks of {8 + length + end}")
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{file} is not a whole safetensors file ({error}); write it again with save_pretrained"
        ) from None
    return header, 8 + length


def _count(file: Path, dtype: str, begin: int, end: int) -> int:
    import numpy as np

    width, exponent = _EXPONENT[dtype]
    total, count = 0, (end - begin) // width
    mask = np.array(exponent, dtype=f"<u{width}")
    for block in range(0, count, _BLOCK):
        bits = np.fromfile(file, f"<u{width}", min(_BLOCK, count - block), offset=begin + block * width)
        total += int(np.count_nonzero((bits & mask) == mask))
    return total
