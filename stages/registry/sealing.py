"""Canonical JSON that carries its own hash, and the hashes of files."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from configs.errors import UserError

CHUNK = 2**20  # bytes per read while hashing: two of them stay in a core's cache
_AT_ONCE = 4  # files hashed together: one core reads 18 GiB/s of what is in memory and hashes 8


def hash_bytes(content: bytes) -> str:
    """BLAKE3 of bytes, 64 hex digits."""
    from blake3 import blake3

    return blake3(content).hexdigest()


def hash_file(path: Path) -> str:
    """BLAKE3 of a file's content; of a large file the next part is read while one is hashed. Raises OSError."""
    from blake3 import blake3

    hasher = blake3()
    with open(path, "rb", buffering=0) as file:
        room = min(CHUNK, os.fstat(file.fileno()).st_size + 4096)  # zeroing a whole chunk takes longer than hashing a small file
        buffers = [memoryview(bytearray(room))]
        count = file.readinto(buffers[0]) or 0
        if count < CHUNK:  # whole, or the beginning of what reads in small parts
            while count:
                hasher.update(buffers[0][:count])
                count = file.readinto(buffers[0]) or 0
            return hasher.hexdigest()
        buffers.append(memoryview(bytearray(CHUNK)))
        with ThreadPoolExecutor(1) as reader:
            while count:
                ahead = reader.submit(file.readinto, buffers[1])
                hasher.update(buffers[0][:count])
                buffers.reverse()
                count = ahead.result() or 0
    return hasher.hexdigest()


def hash_files(files: Mapping[Path, int]) -> dict[Path, str | OSError]:
    """BLAKE3 of many files (path -> bytes), several at once where they are large; in place of a file's hash, what kept it from being read."""
    if sum(files.values()) < 8 * CHUNK:
        return {file: _hash_or_error(file) for file in files}
    with ThreadPoolExecutor(min(_AT_ONCE, os.cpu_count() or 1)) as pool:
        begun = {file: pool.submit(_hash_or_error, file) for file in sorted(files, key=lambda file: -files[file])}  # the longest first
        return {file: begun[file].result() for file in files}


def _hash_or_error(file: Path) -> str | OSError:
    try:
        return hash_file(file)
    except OSError as error:
        return error


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
        same = seal(body) == content  # byte for byte: another spelling of the same JSON, or a missing line end, is damage too
    except ValueError:  # NaN or a lone surrogate: nothing that seal() wrote
        same = False
    if not same:
        raise ValueError("its content does not match the hash it carries: it was edited or damaged")
    return whole
