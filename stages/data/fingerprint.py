"""Identity of rows: what they say, not where they lie."""

from __future__ import annotations

import json
from collections.abc import Sequence

from blake3 import blake3

from stages.data.rows import Demonstration, Message, PreferencePair, Row


def canonical(row: Row) -> str:
    """One row as JSON text, without its place in a file and its weight."""
    if isinstance(row, Demonstration):
        content: list[object] = ["demonstration", [_turn(m) for m in row.messages], *([row.tools] if row.tools else [])]
    elif isinstance(row, PreferencePair):
        content = ["pair", [_turn(m) for m in row.prompt], row.chosen, row.rejected, row.margin]
    else:
        content = ["prompt", [_turn(m) for m in row.prompt], row.columns]
    return json.dumps(content, ensure_ascii=True, sort_keys=True)


def _turn(message: Message) -> tuple[str, ...]:
    """Tool turns say more than others; that those say nothing more keeps the fingerprints they always had."""
    return (message.role, message.content, message.extra) if message.extra else (message.role, message.content)


def fingerprint(rows: Sequence[Row]) -> str:
    """BLAKE3 (hex, 64 digits) over the rows in their order: other content or another order is another fingerprint."""
    digest = blake3()
    for row in rows:
        digest.update(canonical(row).encode() + b"\n")
    return digest.hexdigest()
