"""Writing rows to a JSONL file that is either complete or absent."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    """Write rows to `path` in one rename, making its folder, and return their number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    count, unfinished = 0, path.with_name(f".{path.name}.{os.getpid()}")
    with unfinished.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)
    return count
