"""How a trial's process ended, and what came out of it."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from configs.errors import UserError
from configs.exit_codes import REQUEUE
from launch.sweep.jobs import FULL, Job, error_in
from launch.sweep.metric import Metric

State = Literal["done", "pruned", "failed", "interrupted", "no room"]


@dataclass(frozen=True)
class Ended:
    """The end of a trial: its value, or what went wrong; `published`: step -> checkpoint id and reference."""

    state: State
    value: float | None = None
    error: str = ""
    published: dict[str, list[str]] = field(default_factory=dict)


def how(job: Job, code: int, metric: Metric, folder: Path, registry: Path, early: bool) -> Ended:
    """What became of a trial whose process ended with `code`; `early`: the pruner had it told to stop."""
    if code == 0:
        return _value(job, metric, folder, registry)
    if early and job.told is not None:
        return Ended("pruned")
    if code in (REQUEUE, 130) or job.told is not None:
        return Ended("interrupted")
    error = error_in(job.log, code)
    return Ended("no room" if FULL.search(error) else "failed", error=error)


def _value(job: Job, metric: Metric, folder: Path, root: Path) -> Ended:
    refs = checkpoints_of(job.log)
    try:
        made = _resolve(root, refs)
        name = metric.stage if metric.stage in made else next((step for step in made if step.startswith(metric.stage)), None)
        checkpoint = made[name] if name is not None else None
        published = (checkpoint.info("metrics") or {}) if checkpoint is not None else {}
        place = folder
        if checkpoint is not None and not (folder / metric.stage / "metrics.jsonl").is_file():  # it was made by an earlier trial with the same inputs
            place = Path((checkpoint.info("config") or {}).get("output") or folder / metric.stage).parent
        value = metric.value(place, published)
    except (LookupError, UserError) as error:
        return Ended("failed", error=str(error.args[0]))
    ids = {step: [found.id, found.ref] for step, found in made.items()}
    if not math.isfinite(value):
        return Ended("failed", error=f"{metric.name} is {value}: the run diverged", published=ids)
    return Ended("done", value, published=ids)


def _resolve(root: Path, refs: dict[str, str]) -> dict[str, Any]:
    from stages.registry import Registry

    if not refs:
        return {}
    registry = Registry(root, create=False)
    return {step: registry.resolve(ref) for step, ref in refs.items()}


def checkpoints_of(log: Path) -> dict[str, str]:
    """Step -> the checkpoint that it published or that stood in for it, from the last line that `align run --json` has printed."""
    for line in reversed(log.read_text(encoding="utf-8", errors="replace").splitlines()):
        if line.startswith('{"steps"'):
            return {row["step"]: row["checkpoint"] for row in json.loads(line)["steps"] if row.get("checkpoint")}
    return {}
