"""Plots of a sweep as PNG files in OUTPUT/plots: history, learning curves, slices and importance."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.sweep import study as studies

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from optuna.study import Study

ENOUGH = 8  # finished trials below which importances are noise
DONE, EARLY, FAILED, BEST = "#1f5fa8", "#b0b0b0", "#c0392b", "#e67e22"


def draw(study: Study, found: dict[str, Any], folder: Path) -> list[Path]:
    """Write the plots for which there is something to show; returns their files."""
    done = [row for row in found["trials"] if row["state"] == "done"]
    if not done:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    files = [_save(_history(found), folder / "history.png"), _save(_slices(found), folder / "slices.png")]
    if any(len(row["curve"]) > 1 for row in found["trials"]):
        files.append(_save(_curves(found), folder / "curves.png"))
    if len(found["space"]) > 1 and len(done) >= ENOUGH:
        files.append(_save(_importance(study, found), folder / "importance.png"))
    return files


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=120, layout="constrained")


def _save(figure: Figure, file: Path) -> Path:
    figure.savefig(file)
    return file


def _plain(axes: Axes) -> Axes:
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return axes


def _scale(axes: Axes, found: dict[str, Any]) -> None:
    """A logarithmic axis of values that lie far apart: one trial that diverged must not flatten all others."""
    values = [row["value"] for row in found["trials"] if row["value"] is not None and math.isfinite(row["value"])]
    if values and min(values) > 0 and max(values) / min(values) > 10:
        axes.set_yscale("log")


def _history(found: dict[str, Any]) -> Figure:
    """Each trial's value in the order of the trials, and the best so far."""
    from matplotlib.ticker import MaxNLocator

    figure = _figure(7, 4)
    axes = _plain(figure.subplots())
    rows = sorted(found["trials"], key=lambda row: row["number"])
    done = [row for row in rows if row["state"] == "done"]
    early = [row for row in rows if row["state"] == "ended early" and row["value"] is not None]
    better = min if found["goal"] == "min" else max
    best = [better(row["value"] for row in done[: number + 1]) for number in range(len(done))]
    axes.step([row["number"] for row in done] + [rows[-1]["number"]], [*best, best[-1]], where="post", color=BEST, label="best so far", zorder=1)
    axes.scatter([row["number"] for row in done], [row["value"] for row in done], color=DONE, label="done", zorder=3)
    axes.scatter([row["number"] for row in early], [row["value"] for row in early], facecolors="none", edgecolors="#808080", label="ended early (last value)", zorder=2)
    failed = [row["number"] for row in rows if row["state"] == "failed"]
    axes.plot(failed, [0.02] * len(failed), "x", color=FAILED, transform=axes.get_xaxis_transform(), label="failed" if failed else "_", clip_on=False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _scale(axes, found)
    axes.set(xlabel="trial", ylabel=found["metric"], title=f"{found['metric']} by trial ({found['goal']}imum is best)")
    axes.legend(frameon=False)
    return figure


def _slices(found: dict[str, Any]) -> Figure:
    """The value over each field, one panel a field."""
    keys = list(found["space"])
    columns = min(3, len(keys))
    lines = math.ceil(len(keys) / columns)
    figure = _figure(max(5.0, 4 * columns), 3.6 * lines)
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    shown = [row for row in found["trials"] if row["value"] is not None and row["state"] in ("done", "ended early")]
    for axes, key in zip(panels, keys, strict=False):
        _plain(axes)
        names = sorted({str(row["values"].get(key)) for row in shown}) if any(isinstance(row["values"].get(key), str | bool | None) for row in shown) else None
        for state, style in (("ended early", {"facecolors": "none", "edgecolors": "#808080"}), ("done", {"color": DONE})):
            rows = [row for row in shown if row["state"] == state]
            where = [names.index(str(row["values"].get(key))) if names else row["values"][key] for row in rows]
            axes.scatter(where, [row["value"] for row in rows], label=state, **style)
        best = found["best"]
        axes.scatter([names.index(str(best["values"].get(key))) if names else best["values"][key]], [best["value"]], s=110, facecolors="none", edgecolors=BEST, linewidths=2, label="best")
        if names:
            axes.set_xticks(range(len(names)), names)
        if key in found.get("log", []):
            axes.set_xscale("log")
        _scale(axes, found)
        axes.set(xlabel=key, ylabel=found["metric"])
    for axes in panels[len(keys) :]:
        axes.set_visible(False)
    panels[0].legend(frameon=False)
    return figure


def _curves(found: dict[str, Any]) -> Figure:
    """The metric over a trial's evaluations: the best, those that ran to their end, and where the others were ended."""
    from matplotlib.ticker import MaxNLocator

    figure = _figure(7, 4.2)
    axes = _plain(figure.subplots())
    best = found["best"]["number"]
    told: set[str] = set()
    for row in sorted(found["trials"], key=lambda row: row["number"] == best):
        if not row["curve"]:
            continue
        steps, values = zip(*row["curve"], strict=True)
        name = "best" if row["number"] == best else row["state"]
        colour = {"best": BEST, "done": DONE, "failed": FAILED}.get(name, EARLY)
        axes.plot(steps, values, color=colour, linewidth=2 if name == "best" else 1.1, marker="o" if len(steps) == 1 else None, markersize=3.5, label=name if name not in told else "_")
        if row["state"] == "ended early":
            axes.plot(steps[-1], values[-1], "|", color="#707070", markersize=9)
        told.add(name)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _scale(axes, {"trials": [{"value": value} for row in found["trials"] for _, value in row["curve"]]})
    axes.set(xlabel="evaluation", ylabel=found["metric"], title="learning curves; a bar marks where a trial was ended")
    axes.legend(frameon=False)
    return figure


def _importance(study: Study, found: dict[str, Any]) -> Figure:
    """How much each field decides whether a trial is among the best, by PED-ANOVA (arXiv:2304.10255), of the trials that ran to their end."""
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    with studies.quiet():
        shares = get_param_importances(study, evaluator=PedAnovaImportanceEvaluator())
    figure = _figure(6.5, 1.2 + 0.45 * len(shares))
    axes = _plain(figure.subplots())
    names = list(reversed(shares))
    bars = axes.barh(names, [shares[name] for name in names], color=DONE)
    axes.bar_label(bars, [f"{shares[name]:.0%}" for name in names], padding=3)
    axes.set(xlim=(0, 1.08), xlabel=f"importance (PED-ANOVA, {found['counts']['done']} trials; few trials make it rough)")
    return figure
