"""Canonical JSON that carries its own hash, and the hashes of files."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from configs.errors import UserError

CHUNK = 8 * 2**20  # bytes per read while hashing


def hash_bytes(content: bytes) -> str:
    """BLAKE3 of bytes, 64 hex digits."""
    from blake3 import blake3

    return blake3(content).hexdigest()


def hash_file(path: Path) -> str:
    """BLAKE3 of a file's content, read in chunks. Raises OSError."""
    from blake3 import blake3

    hasher = blake3()
    buffer = memoryview(bytearray(CHUNK))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            hasher.update(buffer[:count])
    return hasher.hexdigest()


def plain(value: Any, where: str) -> Any:
    """A value as JSON can hold it: tuples become lists, paths text, numpy numbers Python's, NaN and infinities text.

    A non-finite metric must not cost the checkpoint that it belongs to, and JSON has no NaN: it is kept as "nan",
    "inf" or "-inf", which no comparison takes for a number. Raises UserError naming the key for anything else.
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(float(value))
    if isinstance(value, Mapping):
        return {_key(key, where): plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item") and getattr(value, "shape", None) == ():
        return plain(value.item(), where)
    raise UserError(f"{where} is a {type(value).__name__}, which JSON cannot hold; give text, numbers, lists or dicts")


def _key(key: Any, where: str) -> str:
    if not isinstance(key, str):
        raise UserError(f"{where} has the key {key!r}; keys must be text")
    return key


def canonical(value: Any) -> bytes:
    """One byte sequence per value: sorted keys, no spaces, UTF-8."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def seal(body: dict[str, Any]) -> bytes:
    """Canonical JSON of `body` plus `hash`, the BLAKE3 of the canonical JSON without it."""
    return canonical({**body, "hash": hash_bytes(canonical(body))}) + b"\n"


def unseal(content: bytes) -> dict[str, Any]:
    """The sealed dict, `hash` included. Raises ValueError saying what is wrong."""
    try:
        whole = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not readable as JSON ({error})") from None
    if not isinstance(whole, dict) or not isinstance(whole.get("hash"), str):
        raise ValueError("carries no hash of its own")
    body = {key: item for key, item in whole.items() if key != "hash"}
    try:
        same = hash_bytes(canonical(body)) == whole["hash"]
    except ValueError:  # NaN or a lone surrogate: nothing that seal() wrote
        same = False
    if not same:
        raise ValueError("its content does not match the hash it carries: it was edited or damaged")
    return whole
