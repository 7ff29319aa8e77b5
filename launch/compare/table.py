"""The rows of a comparison as a table."""

from __future__ import annotations

from typing import Any

MIB = 2**20


def size(count: float) -> str:
    """Bytes in the unit that a person would take."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / MIB:.1f} MiB" if count >= MIB else f"{count / 1024:.0f} KiB"


def table(rows: list[dict[str, Any]], steps: int, what: str) -> Any:
    """A rich table, and below it what could not be measured."""
    from rich.console import Group
    from rich.table import Table

    validated = all(row.get("validated", True) for row in rows)
    made = Table(title=f"{what}, {steps} steps each", caption=f"loss: {'validation' if validated else 'the last of training'}, after {steps} steps; memory: the peak above what the process held before")
    for name, side in (("technique", "left"), ("trained", "right"), ("share", "right"), ("memory", "right"), ("steps/s", "right"), ("loss", "right"), ("rate", "right"), ("published", "right"), ("use it when", "left")):
        made.add_column(name, justify=side, no_wrap=name != "use it when")  # type: ignore[arg-type]
    for row in rows:
        if "reason" in row:
            continue
        made.add_row(
            row["technique"], f"{row['trainable']:,}", f"{row['trainable'] / row['parameters']:.2%}", size(row["memory"]), f"{row['steps_per_second']:.2f}",
            f"{row['loss']:.3f}" if row["loss"] is not None else "–", f"{row['learning_rate']:g}", size(row["bytes"]), row["when"],
        )  # fmt: skip
    reasons = [f"{row['technique']}: {row['reason']}" for row in rows if "reason" in row]
    return Group(made, *(["not measured:"] if reasons else []), *(f"  {reason}" for reason in reasons))
