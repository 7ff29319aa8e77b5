"""The result of a range test as a small table and as a plot."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def table(found: Mapping[str, Any], rows: int) -> None:
    """Print learning rate, loss and smoothed loss at `rows` steps spread over the test, and what is to be seen there."""
    from rich.console import Console
    from rich.table import Table

    shown = Table("step", "learning rate", "loss", "smoothed", "")
    rates = found["rates"]
    marks = {rates.index(found["steepest"]): "falls fastest", rates.index(found["at_lowest"]): "lowest", len(rates) - 1: "diverged" if found["diverged"] else "end"}
    steps = {round(i * (len(rates) - 1) / (rows - 1)) for i in range(rows)} | set(marks)
    for step in sorted(steps):
        loss, smoothed = (found[key][step] for key in ("losses", "smoothed"))
        shown.add_row(str(step + 1), f"{rates[step]:.1e}", *("not finite" if x is None else f"{x:.4f}" for x in (loss, smoothed)), marks.get(step, ""))
    Console().print(shown)


def plot(found: Mapping[str, Any], file: Path) -> Path | None:
    """Write the losses over the learning rate as a PNG; None without matplotlib."""
    if find_spec("matplotlib") is None:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    values = {key: [float("nan") if x is None else x for x in found[key]] for key in ("losses", "smoothed")}
    axes.plot(found["rates"], values["losses"], color="0.75", linewidth=1, label="loss of a step")
    axes.plot(found["rates"], values["smoothed"], color="C0", label="smoothed")
    axes.axvline(found["suggestion"], color="C2", linestyle="--", label=f"suggestion {found['suggestion']:.1e}")
    axes.axvline(found["at_lowest"], color="C3", linestyle=":", label=f"lowest loss {found['at_lowest']:.1e}")
    lowest = min(x for both in values.values() for x in both if x == x)
    axes.set(xscale="log", xlabel="learning rate", ylabel="training loss, nats per token", ylim=(0.95 * lowest, 1.5 * values["smoothed"][0]))
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=110)
    return file
