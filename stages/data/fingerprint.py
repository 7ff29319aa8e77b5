"""Identity of rows: what they say, not where they lie."""

from __future__ import annotations

import json
from collections.abc import Sequence

from blake3 import blake3

from stages.data.rows import Demonstration, PreferencePair, Row


def canonical(row: Row) -> str:
    """One row as JSON text, without its place in a file and its weight."""
    if isinstance(row, Demonstration):
        content: list[object] = ["demonstration", [(m.role, m.content) for m in row.messages]]
    elif isinstance(row, PreferencePair):
        content = ["pair", [(m.role, m.content) for m in row.prompt], row.chosen, row.rejected, row.margin]
    else:
        content = ["prompt", [(m.role, m.content) for m in row.prompt], row.columns]
    return json.dumps(content, ensure_ascii=True, sort_keys=True)


def fingerprint(rows: Sequence[Row]) -> str:
    """BLAKE3 (hex, 64 digits) over the rows in their order: other content or another order is another fingerprint."""
    digest = blake3()
    for row in rows:
        digest.update(canonical(row).encode() + b"\n")
    return digest.hexdigest()
