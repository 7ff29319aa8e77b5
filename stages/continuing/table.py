"""What got better and worse, as lines of text. Imports nothing heavy: `align registry show` prints it too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

METRICS_HEAD = ("held-out rows", "metric", "before", "after", "difference [95 %]", "verdict")
HEAD = ("held-out rows", "loss before", "after", "difference [95 %]", "accuracy before", "after", "verdict")


def lines(record: Mapping[str, Any]) -> list[str]:
    """The table of a manifest's info["continued"], and its notes."""
    table = _table([HEAD, *(_row(found) for found in record.get("sets", []))])
    further = [row for found in record.get("sets", []) for row in _metric_rows(found)]
    table += _table([METRICS_HEAD, *further]) if further else []
    how = {"same": "an adapter is the same one, trained on", "merged": "an adapter was merged into its base first"}.get(str(record.get("adapter")), "")
    notes = [f"{found['name']}: {found['note']}" for found in record.get("sets", []) if found.get("note")]
    return [f"trained on from {record.get('of')} ({how}); losses in nats per token ± standard error", *table, *notes, *record.get("notes", [])]


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _metric_rows(found: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The config's own metrics of one set of rows, before and after."""
    rows: list[tuple[str, ...]] = []
    for name, figure in found.get("metrics", {}).items():
        interval = "" if figure["low"] is None else f" [{figure['low']:+.4g}, {figure['high']:+.4g}]"
        rows.append((f"{found['name']} (n={figure['rows']})", name, f"{figure['before']:.4g}", f"{figure['after']:.4g}", f"{figure['difference']:+.4g}{interval}", figure["verdict"]))
    return rows


def _row(found: Mapping[str, Any]) -> tuple[str, ...]:
    loss, accuracy = found["loss"], found["token_accuracy"]
    interval = "" if loss["low"] is None else f" [{loss['low']:+.4f}, {loss['high']:+.4f}]"
    return (
        f"{found['name']} ({_count(found)})", _with_error(loss, "before", 4), _with_error(loss, "after", 4), f"{loss['difference']:+.4f}{interval}",
        _with_error(accuracy, "before", 3), _with_error(accuracy, "after", 3), found["verdict"],
    )  # fmt: skip


def _count(found: Mapping[str, Any]) -> str:
    return f"{found['rows']} windows of {found['texts']} text{'s' if found['texts'] > 1 else ''}" if "texts" in found else f"n={found['rows']}"


def _with_error(figure: Mapping[str, Any], when: str, digits: int) -> str:
    error = figure[f"{when}_se"]
    return f"{figure[when]:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")
