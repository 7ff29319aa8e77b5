"""What a sweep has found so far: OUTPUT/results.json, the best trial's config in OUTPUT/best.yaml, and the table."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.schema.sweep import Range
from launch.chain.progress import duration
from launch.sweep import study as studies
from launch.sweep.setting import Setting

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial

STATES = {"COMPLETE": "done", "PRUNED": "ended early", "FAIL": "failed", "RUNNING": "not finished"}


def shown(setting: Setting) -> dict[str, Any]:
    """What `align sweep show` needs to know of a sweep, kept in its study."""
    metric = setting.metric
    first = setting.first()
    return {
        "file": setting.subject.file, "metric": metric.name, "stage": metric.stage, "goal": metric.goal, "registry": str(setting.registry),
        "space": {field.key: str(field) for field in setting.fields}, "log": [field.key for field in setting.fields if isinstance(field.values, Range) and field.values.log],
        "configured": first is not None, "sampler": setting.spec.sampler, "pruner": setting.spec.pruner,
    }  # fmt: skip


def gathered(study: Study) -> dict[str, Any]:
    """Everything about the trials, best first: {"metric", "stage", "goal", "best", "configured", "counts", "trials": [{"number", "state", "values", "value", …}]}."""
    about = study.user_attrs.get("shown", {})
    best = studies.best(study)
    trials = sorted((row_of(trial) for trial in studies.counted(study)), key=lambda row: _order(row, about.get("goal", "min")))
    rows = {row["number"]: row for row in trials}
    counts = {state: sum(row["state"] == state for row in trials) for state in STATES.values()}
    first = rows.get(0) if about.get("configured") else None
    return {**about, "best": rows.get(best.number) if best else None, "configured": first, "counts": counts, "trials": trials, "seconds": round(sum(row["seconds"] for row in trials), 1)}


def row_of(trial: FrozenTrial) -> dict[str, Any]:
    """One trial. `value` of one that was ended early is its last evaluation's."""
    attributes = trial.user_attrs
    last = trial.intermediate_values[trial.last_step] if trial.last_step is not None else None
    return {
        "number": trial.number, "state": STATES[trial.state.name], "values": attributes.get("values", dict(trial.params)), "value": trial.value if trial.values else last,
        "evaluations": len(trial.intermediate_values), "curve": [[step, value] for step, value in sorted(trial.intermediate_values.items())],
        "seconds": attributes.get("seconds", 0.0), "error": attributes.get("error"), "same_as": attributes.get("same_as"),
        "published": {step: ref for step, (_, ref) in attributes.get("published", {}).items()}, "extra": attributes.get("extra", []),
    }  # fmt: skip


def _order(row: dict[str, Any], goal: str) -> tuple[int, float, int]:
    place = list(STATES.values()).index(row["state"])
    value = row["value"] if row["value"] is not None else 0.0
    return place, value if goal == "min" else -value, row["number"]


def write(study: Study, setting: Setting) -> dict[str, Any]:
    """Write results.json and, where a trial has come to its end, best.yaml; returns what results.json holds."""
    found = gathered(study)
    best = found["best"]
    if best is not None:
        values = [*best["values"].items(), *((key, value) for key, value in best["extra"])]
        found |= {"command": setting.subject.command(values), "config": str(setting.output / "best.yaml"), "run": run_line(setting)}
        _replace(setting.output / "best.yaml", setting.subject.text(values))
    _replace(setting.output / "results.json", json.dumps(found, indent=1, allow_nan=True) + "\n")
    return found


def run_line(setting: Setting) -> str:
    """The command that runs best.yaml."""
    file = setting.output / "best.yaml"
    return f"align run {file}" if setting.subject.kind == "chain" else f"align {setting.subject.kind} --config {file}"


def _replace(file: Path, text: str) -> None:
    part = file.with_name(f".{file.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, file)


def beyond(study: Study, keep: int) -> list[str]:
    """Ids of the checkpoints that no trial of the best `keep` is, or was made from by it."""
    found = gathered(study)
    kept = [row["number"] for row in found["trials"] if row["state"] == "done"][:keep]
    ids = {trial.number: {entry[0] for entry in trial.user_attrs.get("published", {}).values()} for trial in studies.counted(study)}
    stays = set().union(*(ids[number] for number in kept)) if kept else set()
    return sorted(set().union(*ids.values()) - stays) if ids else []


def show(found: dict[str, Any], output: Path) -> None:
    """Print the table, the best trial beside the config's own values, and what to type next."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    keys = list(found["space"])
    short = {key: key if [other.rpartition(".")[2] for other in keys].count(key.rpartition(".")[2]) > 1 else key.rpartition(".")[2] for key in keys}
    counts = ", ".join(f"{count} {state}" for state, count in found["counts"].items() if count)
    caption = f"{found['metric']} of {found['stage']}, {found['goal']}imum is best; {duration(found['seconds'])} of trials"
    table = Table(title=f"{len(found['trials'])} trials of {found['file']}: {counts}", caption=caption, box=box.SIMPLE_HEAD)
    for head in ("trial", *(short[key] for key in keys), found["metric"].rpartition("/")[2], "evals", "time", "state"):
        table.add_column(Text(head), justify="left" if head == "state" else "right", overflow="fold")
    best = found["best"]["number"] if found["best"] else None
    for row in found["trials"]:
        value = "–" if row["value"] is None else f"{row['value']:.5g}"
        cells = [str(row["number"]), *(number(row["values"].get(key)) for key in keys), value, str(row["evaluations"] or "–"), duration(row["seconds"]), _note(row, found)]
        table.add_row(*map(Text, cells), style="bold" if row["number"] == best else None)
    console = Console()
    if not console.is_terminal:  # in a file, no line is too long
        console.width = max(console.width, Console(width=400).measure(table).maximum)
    console.print(table)
    for line in closing(found, output):
        print(line)


def _note(row: dict[str, Any], found: dict[str, Any]) -> str:
    notes = [row["state"]]
    notes += [what for what, which in (("best", found["best"]), ("as configured", found["configured"])) if which and row["number"] == which["number"]]
    notes += [f"as trial {row['same_as']}"] if row["same_as"] is not None else []
    return " · ".join(notes)


def number(value: Any) -> str:
    """A value as a table shows it."""
    return f"{value:.4g}" if isinstance(value, float) and (value == 0 or abs(value) >= 1e-3) else f"{value:.2e}".replace("e-0", "e-") if isinstance(value, float) else str(value)


def closing(found: dict[str, Any], output: Path) -> list[str]:
    """The lines under the table."""
    lines = [f"trial {row['number']} failed: {row['error'].splitlines()[0]}" for row in found["trials"] if row["error"]]
    best, own = found["best"], found["configured"]
    if best is not None:
        lines.append(f"best: trial {best['number']}, {found['metric']} {best['value']:.6g}" + (f", published as {', '.join(best['published'].values())} in {found['registry']}" if best["published"] else ""))
    if best is not None and own is not None and own["state"] == "done":
        change = best["value"] - own["value"]
        share = f" ({change / abs(own['value']):+.1%})" if own["value"] else ""
        lines.append(f"the config's own values: {own['value']:.6g}" + ("; nothing was better" if best["number"] == own["number"] else f"; the best is {change:+.6g} from it{share}"))
    if "run" in found:
        lines += [f"run it:   {found['run']}", f"or:       {found['command']}"]
    return [*lines, f"results:  {output / 'results.json'}   plots: {output / 'plots'}   logs: {output / 'trials'}/NUMBER/log"]


def written(output: Path) -> dict[str, Any]:
    """What results.json holds; {} where there is none."""
    try:
        return dict(json.loads((output / "results.json").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}
