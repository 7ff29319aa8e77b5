"""How often a trial is evaluated, so that there is something to end it by: a run that evaluates once, at its end, can't be ended early."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

from configs.errors import UserError
from configs.load import model_of
from configs.schema.sweep import Sweep
from launch.sweep.metric import SUPERVISED, Metric


def spread(chain: Any, metric: Metric, spec: Sweep) -> list[tuple[str, int]]:
    """train.eval_every of the metric's stage for `spec.evaluations` evaluations, and train.save_every for a third as many saves.

    [] where the config says it itself, where evaluations decide which weights are published, and where the number of steps is not known.
    """
    if metric.stage not in SUPERVISED or not metric.reported:
        return []
    section = getattr(chain, metric.stage)
    train = section.train
    if train.eval_every is not None or train.early_stopping_patience is not None or getattr(section, "packing", False):
        return []
    chosen_by = getattr(section, "evaluation", None)
    if getattr(chosen_by, "metric", None) is not None or getattr(chosen_by, "early_stopping", None) is not None:
        return []
    steps = train.max_steps or _steps(metric.stage, section)
    if steps is None:
        return []
    every = max(1, round(steps / spec.evaluations))
    found = [(f"{metric.stage}.train.eval_every", every)]
    return found if train.save_every is not None else [*found, (f"{metric.stage}.train.save_every", min(steps, 3 * every))]


def _steps(stage: str, section: Any) -> int | None:
    """Optimizer steps of a stage, but for rows that are dropped for their length; None where its data is not here."""
    if any(source.path.startswith("hf:") or not Path(source.path).exists() for source in section.data):
        return None
    plain = section.model_dump(mode="json", by_alias=True)
    rows = _rows(stage, json.dumps({key: plain[key] for key in ("name", "init_from", "data", "split")}))
    return None if rows is None else max(1, math.ceil(section.train.epochs * rows / section.train.batch_size))


@functools.lru_cache(maxsize=64)
def _rows(stage: str, text: str) -> int | None:
    """Training rows of the data and split in a config."""
    from stages import data

    section: Any = model_of(stage).model_validate_json(text)
    read: Any = data.read_demonstrations if stage == "sft" else data.read_pairs
    try:
        return len(data.Splitter(section.split).split(read(section.data).rows).train)
    except UserError:
        return None  # the stage says what is wrong with it
