"""What got better and worse, as lines of text. Imports nothing heavy: `align registry show` prints it too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

HEAD = ("held-out rows", "loss before", "after", "difference [95 %]", "accuracy before", "after", "verdict")


def lines(record: Mapping[str, Any]) -> list[str]:
    """The table of a manifest's info["continued"], and its notes."""
    rows = [HEAD, *(_row(found) for found in record.get("sets", []))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD))]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    how = {"same": "an adapter is the same one, trained on", "merged": "an adapter was merged into its base first"}.get(str(record.get("adapter")), "")
    notes = [f"{found['name']}: {found['note']}" for found in record.get("sets", []) if found.get("note")]
    return [f"trained on from {record.get('of')} ({how}); losses in nats per token ± standard error", *table, *notes, *record.get("notes", [])]


def _row(found: Mapping[str, Any]) -> tuple[str, ...]:
    loss, accuracy = found["loss"], found["token_accuracy"]
    interval = "" if loss["low"] is None else f" [{loss['low']:+.4f}, {loss['high']:+.4f}]"
    return (
        f"{found['name']} (n={found['rows']})", _with_error(loss, "before", 4), _with_error(loss, "after", 4), f"{loss['difference']:+.4f}{interval}",
        _with_error(accuracy, "before", 3), _with_error(accuracy, "after", 3), found["verdict"],
    )  # fmt: skip


def _with_error(figure: Mapping[str, Any], when: str, digits: int) -> str:
    error = figure[f"{when}_se"]
    return f"{figure[when]:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")
