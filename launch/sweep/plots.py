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

ENOUGH = 10  # finished trials below which importances are noise
# The share of trials that importance asks about. Of a made-up loss with one decisive field, the decisive one came first in 35 of 36 studies of 10 to 40
# trials; with optuna's 0.1, which is one trial of ten, in 25 of 36, and a field without any effect in the other 11.
UPPER = 0.5
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


def _frame(axes: Axes, found: dict[str, Any], key: str | None = None) -> None:
    """Set the axis of values by the trials that ran to their end, and mark at its edge the others that lie beyond it.

    After one evaluation of nine a loss is far above any final one: drawn to scale, it would flatten what is to be compared.
    """
    values = [row["value"] for row in found["trials"] if row["state"] == "done"]
    early = [row for row in found["trials"] if row["state"] == "ended early" and row["value"] is not None and math.isfinite(row["value"])]
    if len(values) < 2 or max(values) == min(values):
        values += [row["value"] for row in early]
    low, high = min(values), max(values)
    if low > 0 and high / low > 10:
        axes.set_yscale("log")
        edges = (low / (high / low) ** 0.15, high * (high / low) ** 0.15)
    else:
        room = 0.15 * (high - low) or 0.1 * abs(high) or 0.1
        edges = (low - room, high + room)
    axes.set_ylim(*edges)
    where = {row["number"]: row["number"] if key is None else _at(row, key, found) for row in early}
    inside = [row for row in early if edges[0] <= row["value"] <= edges[1]]
    axes.scatter([where[row["number"]] for row in inside], [row["value"] for row in inside], facecolors="none", edgecolors="#808080", label="ended early (last value)" if inside else "_", zorder=2)
    for marker, height, beyond in (("^", 0.985, [row for row in early if row["value"] > edges[1]]), ("v", 0.015, [row for row in early if row["value"] < edges[0]])):
        if beyond:
            axes.plot([where[row["number"]] for row in beyond], [height] * len(beyond), marker, color="#808080", markerfacecolor="none", transform=axes.get_xaxis_transform(), label="ended early, beyond the axis", zorder=2)


def _names(found: dict[str, Any], key: str) -> list[str] | None:
    """The values of a field that is no number, in order; None of numbers."""
    values = [row["values"].get(key) for row in found["trials"]]
    return sorted({str(value) for value in values}) if any(isinstance(value, str | bool | list | dict | None) for value in values) else None


def _at(row: dict[str, Any], key: str, found: dict[str, Any]) -> float:
    """Where a trial stands on a field's axis."""
    names = _names(found, key)
    return names.index(str(row["values"].get(key))) if names else row["values"][key]


def _history(found: dict[str, Any]) -> Figure:
    """Each trial's value in the order of the trials, and the best so far."""
    from matplotlib.ticker import MaxNLocator

    figure = _figure(7, 4)
    axes = _plain(figure.subplots())
    rows = sorted(found["trials"], key=lambda row: row["number"])
    done = [row for row in rows if row["state"] == "done"]
    better = min if found["goal"] == "min" else max
    best = [better(row["value"] for row in done[: number + 1]) for number in range(len(done))]
    axes.step([row["number"] for row in done] + [rows[-1]["number"]], [*best, best[-1]], where="post", color=BEST, label="best so far", zorder=1)
    axes.scatter([row["number"] for row in done], [row["value"] for row in done], color=DONE, label="done", zorder=3)
    _frame(axes, found)
    if failed := [row["number"] for row in rows if row["state"] == "failed"]:
        axes.plot(failed, [0.02] * len(failed), "x", color=FAILED, transform=axes.get_xaxis_transform(), label="failed")
    axes.set_xlim(-0.5, rows[-1]["number"] + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="trial", ylabel=found["metric"], title=f"{found['metric']} by trial ({found['goal']}imum is best)")
    figure.legend(frameon=False, loc="outside lower center", ncols=4)
    return figure


def _slices(found: dict[str, Any]) -> Figure:
    """The value over each field, one panel a field."""
    keys = list(found["space"])
    columns = min(3, len(keys))
    lines = math.ceil(len(keys) / columns)
    figure = _figure(max(5.0, 4 * columns), 3.6 * lines + 0.4)
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    done, best = [row for row in found["trials"] if row["state"] == "done"], found["best"]
    for axes, key in zip(panels, keys, strict=False):
        _plain(axes)
        axes.scatter([_at(row, key, found) for row in done], [row["value"] for row in done], color=DONE, label="done", zorder=3)
        axes.scatter([_at(best, key, found)], [best["value"]], s=110, facecolors="none", edgecolors=BEST, linewidths=2, label="best", zorder=4)
        _frame(axes, found, key)
        if names := _names(found, key):
            axes.set_xticks(range(len(names)), names)
            axes.set_xlim(-0.5, len(names) - 0.5)
        elif key in found.get("log", []):
            axes.set_xscale("log")
        axes.set(xlabel=key, ylabel=found["metric"])
    for axes in panels[len(keys) :]:
        axes.set_visible(False)
    figure.legend(*panels[0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=4)
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
        ended: dict[str, Any] = {"marker": "x", "markevery": [len(steps) - 1], "markersize": 5} if name in ("ended early", "failed") else {}
        axes.plot(steps, values, color=colour, linewidth=2 if name == "best" else 1.1, label=name if name not in told else "_", **ended)
        told.add(name)
    seen = [value for row in found["trials"] for _, value in row["curve"] if math.isfinite(value)]
    if min(seen) > 0 and max(seen) / min(seen) > 10:
        axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="evaluation", ylabel=found["metric"], title="learning curves (a cross is where a trial was ended)")
    axes.legend(frameon=False)
    return figure


def _importance(study: Study, found: dict[str, Any]) -> Figure:
    """How much each field decides whether a trial is in the better half, by PED-ANOVA (arXiv:2304.10255), of the trials that ran to their end."""
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    with studies.quiet():
        shares = get_param_importances(study, evaluator=PedAnovaImportanceEvaluator(target_quantile=UPPER))
    figure = _figure(6.5, 1.2 + 0.45 * len(shares))
    axes = _plain(figure.subplots())
    names = list(reversed(shares))
    bars = axes.barh(names, [shares[name] for name in names], color=DONE)
    axes.bar_label(bars, [f"{shares[name]:.0%}" for name in names], padding=3)
    axes.set(xlim=(0, 1.08), xlabel=f"importance (PED-ANOVA, {found['counts']['done']} trials; rough where they are few)")
    return figure
