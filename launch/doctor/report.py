"""The doctor's findings for a terminal, for a bug report, and for machines; all of them redacted."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

from launch.doctor.check import LEVELS, Problem, Result
from launch.doctor.redact import Redactor

MARKS = {"ok": "ok", "warning": "warning", "failed": "FAILED"}
STYLES = {"ok": "green", "warning": "yellow", "failed": "bold red"}


def redacted(results: Sequence[Result], redactor: Redactor) -> list[Result]:
    """The results without secrets, names of persons and machines. Commands to type keep working: they name no secret."""
    return [
        Result(
            item.name, redactor.text(item.summary), tuple(Problem(p.level, redactor.text(p.found), redactor.text(p.advice)) for p in item.problems),
            redactor.value(item.facts), item.seconds,
        )
        for item in results
    ]  # fmt: skip


def worst(results: Sequence[Result]) -> str:
    """ok, warning or failed: the worst of all."""
    return max((item.status for item in results), key=LEVELS.index, default="ok")


def as_json(results: Sequence[Result], left_out: Sequence[str]) -> dict[str, Any]:
    """{"status", "checks": [{"name", "status", "summary", "problems", "facts", "seconds"}], "left_out"}."""
    rows = [
        {"name": item.name, "status": item.status, "summary": item.summary, "problems": [vars(p) for p in item.problems], "facts": item.facts, "seconds": round(item.seconds, 2)}
        for item in results
    ]
    return {"status": worst(results), "checks": rows, "left_out": list(left_out)}


def block(results: Sequence[Result], left_out: Sequence[str]) -> str:
    """Everything that was found as plain text, to be pasted into a bug report."""
    lines = ["```text", f"align doctor: {counted(results)}" + (f"; left out: {', '.join(left_out)}" if left_out else "")]
    for item in results:
        lines.append(f"[{MARKS[item.status]}] {item.name}: {item.summary}".rstrip(": ") + f" ({item.seconds:.1f} s)")
        lines += [f"    {MARKS[problem.level]}: {problem.found}" for problem in item.problems]
        lines += [f"    {key} = {_plain(value)}" for key, value in item.facts.items() if value not in (None, [], {}, "")]
    return "\n".join([*lines, "```"])


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def counted(results: Sequence[Result]) -> str:
    """Such as "12 ok, 1 warning, 0 failed"."""
    numbers = {level: sum(item.status == level for item in results) for level in LEVELS}
    return f"{numbers['ok']} ok, {numbers['warning']} warning{'s' if numbers['warning'] != 1 else ''}, {numbers['failed']} failed"


def show(results: Sequence[Result], left_out: Sequence[str]) -> None:
    """Print a table with what to do, then the block."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console = Console(width=140)  # a log has no width; 80 would break every line
    table = Table(title=Text(f"align doctor: {counted(results)}"), show_lines=False)
    for heading in ("check", "", "found"):
        table.add_column(heading, overflow="fold")
    for item in results:
        text = Text(item.summary)
        for problem in item.problems:
            text.append(("\n" if text.plain else "") + problem.found, style=STYLES[problem.level])
            text.append(f"\n→ {problem.advice}")
        table.add_row(Text(item.name), Text(MARKS[item.status], style=STYLES[item.status]), text)
    console.print(table)
    print("For a bug report (secrets, names and addresses are taken out; read it before you paste it):")
    print(block(results, left_out))
