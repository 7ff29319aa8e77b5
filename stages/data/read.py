"""Sources into rows: every problem of every row found first, then told in one error."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, cast

from configs.errors import UserError
from stages.data import formats
from stages.data.files import read_records
from stages.data.fingerprint import canonical
from stages.data.rows import Demonstration, Kind, Loaded, Messages, PreferencePair, Prompt, Report, Row, RowError

if TYPE_CHECKING:
    from configs.schema.common import Source

SHOWN = 5
PLACEHOLDER = re.compile(r"\{\{\s*[A-Za-z_][\w.\- ]*\}\}")
OUR_COLUMNS = {
    "demonstrations": ("messages", "prompt", "completion", "instruction", "input", "output", "conversations", "system", "tools", "chosen", "rejected"),
    "pairs": ("messages", "prompt", "instruction", "input", "conversations", "system", "chosen", "rejected", "margin"),
}


def read_demonstrations(sources: Sequence[Source]) -> Loaded[Demonstration]:
    """Read what SFT imitates. Raises UserError for files that cannot be read and rows that cannot be used."""
    return cast("Loaded[Demonstration]", read_rows("demonstrations", sources))


def read_pairs(sources: Sequence[Source]) -> Loaded[PreferencePair]:
    """Read preference pairs; rows with chosen equal to rejected are dropped and counted in `report.equal_pairs`.

    Raises UserError as `read_demonstrations` does, and when every pair is equal.
    """
    return cast("Loaded[PreferencePair]", read_rows("pairs", sources))


def read_prompts(sources: Sequence[Source]) -> Loaded[Prompt]:
    """Read prompts, also out of demonstrations and pairs; other scalar columns are kept for scorers."""
    return cast("Loaded[Prompt]", read_rows("prompts", sources))


def read_rows(kind: Kind, sources: Sequence[Source]) -> Loaded[Any]:
    """Read all sources as `kind`, in order. Raises one UserError for all bad rows: the first 5 and their number."""
    report, problems = Report(), cast("list[str]", [])
    rows: list[Row] = []
    for source in sources:
        rows += _read_source(kind, source, report, problems)
    if problems:
        shown = "\n".join(f"  {problem}" for problem in problems[:SHOWN])
        more = f"\n  … and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise UserError(
            f"{len(problems)} bad row{'s' if len(problems) > 1 else ''} in {kind} "
            f"(line numbers in .jsonl, .csv and .txt; indices from 0 in .json and .parquet):\n{shown}{more}\nCorrect these rows or take them out; nothing was trained."
        )
    if kind == "pairs":
        rows = _drop_equal(cast("list[PreferencePair]", rows), report)
    _count(rows, report)
    return Loaded(rows, report)


def _read_source(kind: Kind, source: Source, report: Report, problems: list[str]) -> list[Row]:
    _check_columns(kind, source)
    layout = None if source.format == "auto" else str(source.format)
    rows: list[Row] = []
    left_out: set[str] = set()
    before = len(problems)
    for record in read_records(source, problems):
        layout = layout or formats.recognise(kind, record.fields, record.where)
        try:
            if kind == "demonstrations":
                rows.append(formats.demonstration(record.fields, layout, record.where, source.weight))
            elif kind == "pairs":
                rows.append(formats.pair(record.fields, layout, record.where, source.weight))
            else:
                row, names = formats.prompt(record.fields, layout, record.where, source.weight)
                rows.append(row)
                left_out.update(names)
        except RowError as error:
            problems.append(f"{record.where}: {error}")
    if not rows and len(problems) == before:
        raise UserError(f"{source.path}: holds no rows; expected {kind} ({formats.LAYOUTS[kind]})")
    if left_out:
        names_text = ", ".join(sorted(left_out))
        report.warnings.append(f"{source.path}: columns {names_text} do not reach scorers (the names are theirs); rename them with `columns`")
    report.sources.append({"path": source.path, "format": layout, "rows": len(rows), "weight": source.weight})
    return rows


def _check_columns(kind: Kind, source: Source) -> None:
    known = OUR_COLUMNS.get(kind)
    unknown = [name for name in source.columns if known and name not in known]
    if unknown and known:
        close = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise UserError(f"{source.path}: `columns` names {unknown[0]!r}, which {kind} do not have{hint} Ours are: {', '.join(known)}")


def _drop_equal(pairs: list[PreferencePair], report: Report) -> list[Row]:
    kept: list[Row] = [pair for pair in pairs if pair.chosen.strip() != pair.rejected.strip()]
    report.equal_pairs = len(pairs) - len(kept)
    if pairs and not kept:
        raise UserError(f"{pairs[0].where}: chosen equals rejected in all {len(pairs)} pairs; there is no preference to learn")
    if report.equal_pairs:
        report.warnings.append(f"{report.equal_pairs} of {len(pairs)} pairs have chosen equal to rejected and were dropped")
    return kept


def contents(row: Row) -> Iterable[str]:
    """Every text of a row."""
    turns: Messages = row.messages if isinstance(row, Demonstration) else row.prompt
    yield from (turn.content for turn in turns)
    if isinstance(row, PreferencePair):
        yield from (row.chosen, row.rejected)


def _count(rows: list[Row], report: Report) -> None:
    """Fill in the counts of rows, identical duplicates and unfilled placeholders."""
    report.rows = len(rows)
    report.duplicates = len(rows) - len({canonical(row) for row in rows})
    unfilled = [row for row in rows if any(PLACEHOLDER.search(content) for content in contents(row))]
    report.placeholders = len(unfilled)
    if report.duplicates:
        report.warnings.append(f"{report.duplicates} rows are identical to an earlier one (kept)")
    if unfilled:
        found = next(match.group() for content in contents(unfilled[0]) if (match := PLACEHOLDER.search(content)))
        report.warnings.append(f"{len(unfilled)} rows hold an unfilled placeholder, such as {found} at {unfilled[0].where}")
