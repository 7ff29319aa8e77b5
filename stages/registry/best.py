"""`stage/name@best:METRIC`: the version whose newest evaluation has the best value, if the numbers can be compared."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from configs.errors import UserError

LOWER_IS_BETTER = ("loss", "perplexity", "kl")  # by the end of the metric's name; everything else: higher is better


_TEST = re.compile(r"(?:^|\.)test/")  # as SFT's final test names them


def check_chooses(metric: str, asked: str) -> None:
    """Refuse a metric of the test part to choose a checkpoint by, however it is written. `asked`: what asks for it, for the message.

    Raises:
        UserError: with what to take instead.
    """
    if found := _TEST.search(metric):
        raise UserError(
            f"{asked}: {metric} is of the test part, which is measured once, on what has been chosen already: what is chosen by it is no longer tested by it. "
            f"Choose by the validation part, evaluation/{metric[found.end() :]}"
        )


def lower_is_better(metric: str) -> bool:
    return metric.lower().endswith(LOWER_IS_BETTER)


def metric_value(result: Mapping[str, Any], metric: str) -> float | None:
    """The number under `metric` in one result: in its `metrics` or at the top, by flat key or by dotted path; of a
    {"mean": …, "se": …} the mean. None when there is none or it is not finite."""
    for place in (result.get("metrics"), result):
        value: Any = place
        if isinstance(value, Mapping) and metric in value:
            value = value[metric]
        else:
            for part in metric.split("."):
                value = value.get(part) if isinstance(value, Mapping) else None
        if isinstance(value, Mapping):
            value = value.get("mean")
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    return None


def pick(family: str, metric: str, evaluations: Mapping[int, list[dict[str, Any]]]) -> int:
    """The best version. `evaluations`: version -> its results, oldest first. Of equals the newest version.

    Only versions that were evaluated for the metric take part, each with its newest result that has it.
    Raises UserError when there is no number, when the numbers come from different evaluation sets, or when they are of the test part.
    """
    check_chooses(metric, f"{family}@best:{metric}")
    values, sets = {}, {}
    for version, results in evaluations.items():
        for result in reversed(results):
            if (value := metric_value(result, metric)) is not None:
                values[version], sets[version] = value, result["eval_set"]
                break
    if not values:
        known = sorted({key for results in evaluations.values() for result in results for key in _names(result)})
        raise UserError(
            f"{family}@best:{metric}: no version of {family} was evaluated for {metric}. "
            + (f"Known metrics: {', '.join(known)}. " if known else "")
            + f"Evaluate one: align eval {family}@{max(evaluations)}"
        )
    if len(set(sets.values())) > 1:
        measured = ", ".join(f"@{version} on {sets[version]} ({values[version]:.4g})" for version in sorted(values))
        raise UserError(
            f"{family}@best:{metric}: the numbers come from different evaluation sets and cannot be compared: "
            f"{measured}. Evaluate these versions on one set (align eval), then ask again."
        )
    sign = -1 if lower_is_better(metric) else 1
    return max(values, key=lambda version: (sign * values[version], version))


def best_of_each_set(metric: str, evaluations: Mapping[int, list[dict[str, Any]]]) -> dict[str, int]:
    """Evaluation set -> the best version on it, by each version's newest result there. Numbers from different sets are not compared.

    Raises UserError for a metric of the test part.
    """
    check_chooses(metric, f"best {metric}")
    values: dict[str, dict[int, float]] = {}
    for version, results in evaluations.items():
        for result in results:
            if (value := metric_value(result, metric)) is not None:
                values.setdefault(result["eval_set"], {})[version] = value
    sign = -1 if lower_is_better(metric) else 1
    return {name: max(found, key=lambda version: (sign * found[version], version)) for name, found in values.items()}


def _names(result: Mapping[str, Any]) -> list[str]:
    place = result.get("metrics") if isinstance(result.get("metrics"), Mapping) else result
    assert place is not None
    return [key for key in place if metric_value(result, key) is not None and not _TEST.search(key)]
