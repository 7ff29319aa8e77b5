"""An evaluation for people: one row per model, then completions side by side."""

from __future__ import annotations

import os
from typing import Any

from configs.printable import printable

HEADINGS = ("model", "score ± se", "win rate [95 %]", "KL k1 ± se", "KL k3", "length", "EOS", "ppl")


def rows(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """The cells of the table, one tuple per model, in the order of HEADINGS."""
    return [_row(label, figures, result) for label, figures in result["models"].items()]


def _row(label: str, figures: dict[str, Any], result: dict[str, Any]) -> tuple[str, ...]:
    low, high = figures["win_rate_ci"]
    kl = figures["kl"]
    return (
        label,
        _estimate(figures["score"]["mean"], figures["score"]["se"], 3),
        "–" if label == result["against"] else f"{figures['win_rate']:.3f} [{low:.3f}, {high:.3f}] n={figures['prompts']}",
        "other tokens" if kl is None else "–" if label == result["reference"] else _estimate(kl["k1"], kl["k1_se"], 2),
        "–" if kl is None or label == result["reference"] else f"{kl['k3']:.2f}",
        f"{figures['length']:.1f}",
        f"{figures['eos_rate']:.0%}",
        "–" if figures["perplexity"] is None else f"{figures['perplexity']:.2f}",
    )


def _estimate(mean: float, se: float | None, digits: int) -> str:
    return f"{mean:.{digits}f} ± " + ("?" if se is None else f"{se:.{digits}f}")


def show(result: dict[str, Any]) -> None:
    """Print the table and the samples to stdout."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console = Console(width=120)  # a log has no width; 80 would break the numbers
    count, detail = next(iter(result["models"].values())), result["eval_set_detail"]
    title = f"{count['prompts']} prompts ({detail['subset']}), {detail['samples_per_prompt']} completion(s) of each, evaluation set {result['eval_set']}"
    if result["too_long"]:
        title += f"; {result['too_long']} prompts too long"
    table = Table(title=Text(title), caption=Text(f"win rate against {result['against']} over n prompts, KL to {result['reference']} in nats"))
    for index, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="left" if index == 0 else "right")
    for row in rows(result):
        table.add_row(*(Text(printable(cell)) for cell in row))  # Text: a label or completion with [brackets] is no markup
    console.print(table)
    for sample in result["samples"]:
        side = Table(title=Text(printable(sample["prompt"])), show_lines=True)
        for heading in ("model", "score", "completion"):
            side.add_column(heading, justify="right" if heading == "score" else "left")
        for label, text in sample["completions"].items():
            side.add_row(Text(printable(label)), f"{sample['scores'][label]:.3f}", Text(printable(text)))
        console.print(side)
