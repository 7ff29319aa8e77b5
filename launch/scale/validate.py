"""`python -m launch.scale.validate [--json]`: the model against every published point, with the error of each.

Three numbers were set, on four points: `gemm` and `activation_traffic` on MPT-7B and MPT-125M on 8 A100-80GB, H100's `gemm` on MPT-7B on
8 H100, and for DeepSpeed-Chat's software a `gemm` of its own on OPT-13B on 8 A100-80GB. All other points are held out. `align plan` uses the
first two alone, for it plans this project's PPO and not DeepSpeed-Chat's: all ten of DeepSpeed-Chat's points are then held out.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from launch.scale.hardware import CHAT_GEMM, CHAT_LAUNCH, Efficiency
from launch.scale.published import PROMPTS_OF_THE_BLOG, Point, chat, pretraining
from launch.scale.step import Row, scale


@dataclass(frozen=True)
class Comparison:
    """A point and what the model says. error: predicted time over published time, minus 1: above 0 the model is too slow."""

    point: Point
    predicted: float
    error: float
    bound: str


def predict(point: Point) -> Row:
    """The model's row for a point's number of GPUs."""
    return scale(point.facts, [point.gpus], point.hardware)[0]


def compare(point: Point) -> Comparison:
    """Prediction in the point's unit."""
    row = predict(point)
    if point.unit == "hours":
        return Comparison(point, row.hours, row.hours / point.value - 1, row.bound)
    speed = row.tokens_per_second / point.gpus
    return Comparison(point, speed, point.value / speed - 1, row.bound)


def under_chat(points: Sequence[Point], launch: float = CHAT_LAUNCH, **gemm: float) -> list[Point]:
    """The points under DeepSpeed-Chat's software: fused kernels in sampling and, unless `gemm` says otherwise, a share of the peak of its own."""
    return [replace(point, hardware=point.hardware.with_efficiency(**({"gemm": CHAT_GEMM, "launch": launch} | gemm))) for point in points]


def as_planned(*, ppo: bool) -> list[float]:
    """Errors of published times under what `align plan` assumes, without the points that set it: of pretraining runs, or of DeepSpeed-Chat's PPO."""
    if ppo:
        return [compare(point).error for point in chat()]
    return [found.error for found in map(compare, pretraining()) if not found.point.calibrates]


def held_out(found: Sequence[Comparison]) -> dict[str, float]:
    """Median, mean and largest size of the error over the points that set no constant."""
    sizes = [abs(item.error) for item in found if not item.point.calibrates]
    return {"points": len(sizes), "median": statistics.median(sizes), "mean": statistics.fmean(sizes), "worst": max(sizes)}


@dataclass(frozen=True)
class Scaling:
    """Speed per GPU on the largest number of GPUs over that on the smallest, of one model: published and predicted."""

    case: str
    smallest: int
    largest: int
    published: float
    predicted: float


def scalings(found: Sequence[Comparison]) -> list[Scaling]:
    """One row per case with several numbers of GPUs on several nodes: one node alone often has a smaller micro-batch for want of memory."""
    cases: dict[str, list[Comparison]] = {}
    for item in found:
        if item.point.unit == "hours" or item.point.gpus > item.point.hardware.network.node_size:
            cases.setdefault(f"{item.point.source} {item.point.case}", []).append(item)
    rows = []
    for case, items in cases.items():
        first, last = (pick(items, key=lambda item: item.point.gpus) for pick in (min, max))
        if first.point.gpus < last.point.gpus:
            rows.append(Scaling(case, first.point.gpus, last.point.gpus, _per_gpu(last, last.point.value) / _per_gpu(first, first.point.value), _per_gpu(last, last.predicted) / _per_gpu(first, first.predicted)))
    return rows


def _per_gpu(item: Comparison, value: float) -> float:
    """Speed per GPU in some unit: hours are for the same work on any number of GPUs."""
    return 1 / (value * item.point.gpus) if item.point.unit == "hours" else value


def tables() -> dict[str, list[Comparison]]:
    """Title -> comparisons."""
    return {
        "SFT arithmetic (pretraining runs)": [compare(point) for point in pretraining()],
        "DeepSpeed-Chat step 3, 264,292 prompts, its own gemm": [compare(point) for point in under_chat(chat())],
        "DeepSpeed-Chat step 3, 264,292 prompts, as align plan and its --scale have it (the pretraining runs' gemm, eager launches)": [compare(replace(point, calibrates=False)) for point in chat()],
        "DeepSpeed-Chat step 3, 264,292 prompts, the pretraining runs' gemm": [compare(point) for point in under_chat(chat(), gemm=Efficiency().gemm)],
        "DeepSpeed-Chat step 3, 131,900 prompts, the pretraining runs' gemm": [compare(point) for point in under_chat(chat(PROMPTS_OF_THE_BLOG), gemm=Efficiency().gemm)],
        "DeepSpeed-Chat step 3, assumed batches halved": [compare(point) for point in under_chat(chat(batch_factor=0.5)) if point.assumed],
        "DeepSpeed-Chat step 3, assumed batches doubled": [compare(point) for point in under_chat(chat(batch_factor=2.0)) if point.assumed],
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(prog="python -m launch.scale.validate", description="The scaling model against published training speeds.")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    found = tables()
    if args.json:
        rows = {title: [_plain(item) for item in items] for title, items in found.items()}
        growth = [vars(row) for items in list(found.values())[:2] for row in scalings(items)]
        print(json.dumps({"tables": rows, "held_out": {title: held_out(items) for title, items in found.items()}, "scaling": growth}))
        return 0
    for title, items in found.items():
        print(f"\n{title}\n{'source':<15}{'case':<34}{'GPUs':>5}{'published':>11}{'predicted':>11}{'error':>8}  bound")
        for item in items:
            point = item.point
            mark = "  set on this point" if point.calibrates else f"  assumed: {point.assumed}" if point.assumed else ""
            print(f"{point.source:<15}{point.case:<34}{point.gpus:>5}{point.value:>11.5g}{item.predicted:>11.5g}{item.error:>+8.0%}  {item.bound}{mark}")
        summary = held_out(items)
        print(f"held out: {summary['points']:.0f} points, error of time: median {summary['median']:.1%}, mean {summary['mean']:.1%}, worst {summary['worst']:.0%}")
    print(f"\nSpeed per GPU, many against few\n{'case':<38}{'GPUs':>10}{'published':>11}{'predicted':>11}")
    for row in (row for items in list(found.values())[:2] for row in scalings(items)):
        print(f"{row.case:<38}{f'{row.smallest}→{row.largest}':>10}{row.published:>11.0%}{row.predicted:>11.0%}")
    return 0


def _plain(item: Comparison) -> dict[str, object]:
    point = item.point
    return {
        "source": point.source, "case": point.case, "gpus": point.gpus, "unit": point.unit, "published": point.value, "predicted": item.predicted,
        "error": item.error, "bound": item.bound, "calibrates": point.calibrates, "assumed": point.assumed,
    }  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
