"""`align data check` and `align data show`: look at a file before a stage does."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.printable import printable

if TYPE_CHECKING:
    from configs.schema.common import Source
    from stages.data import Demonstration, Formatter, Loaded, PreferencePair, Prompt
    from stages.data.rows import Kind, Messages, Row

FORMATS = ("auto", "messages", "prompt_completion", "alpaca", "sharegpt", "preference", "hh", "text")
KINDS = ("demonstrations", "pairs", "prompts")


def add_parser(subparsers: Any) -> None:
    """Register `data` with its two verbs; each sets `func`, which takes the arguments and returns an exit code."""
    parser = subparsers.add_parser("data", help="check data files and show what a stage makes of them")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    check = verbs.add_parser("check", help="read files and report counts, lengths, duplicates and problems")
    check.add_argument("files", nargs="+", metavar="FILE", help=".jsonl, .json, .csv, .parquet, .txt, or hf:OWNER/NAME")
    _add_reading(check)
    check.add_argument("--json", action="store_true", help="print the report as JSON")
    check.set_defaults(func=run_check)
    show = verbs.add_parser("show", help="show rows as a tokenizer and a template render them, and what the loss covers")
    show.add_argument("file", metavar="FILE")
    show.add_argument("--tokenizer", required=True, metavar="PATH", help="a Hugging Face folder or name")
    show.add_argument("--template", default="auto", help="auto, plain, chatml, raw, llama3, qwen, zephyr, mistral, gemma or a .jinja file (default: auto)")
    show.add_argument("--loss-on", choices=("all", "last"), default="all", help="assistant turns that the loss covers (default: all)")
    show.add_argument("-n", type=int, default=3, metavar="ROWS", help="rows to show (default: 3)")
    _add_reading(show)
    show.set_defaults(func=run_show)


def _add_reading(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--format", choices=FORMATS, default="auto", help="layout of the rows (default: from the columns)")
    parser.add_argument("--as", dest="kind", choices=KINDS, help="what the rows are (default: from the columns)")


def run_check(args: argparse.Namespace) -> int:
    """Report on every file; 2 when any of them cannot be used."""
    from configs.errors import UserError

    results: list[dict[str, Any]] = []
    for file in args.files:
        try:
            kind, loaded = load(_source(file, args.format), args.kind)
            results.append({"file": file, "ok": True, **describe(kind, loaded)})
        except UserError as error:
            results.append({"file": file, "ok": False, "error": str(error)})
    if args.json:
        print(json.dumps({"files": results}, indent=2, ensure_ascii=False))
    else:
        for result in results:
            _print_result(result)
    return 0 if all(result["ok"] for result in results) else 2


def run_show(args: argparse.Namespace) -> int:
    """Print `-n` rows with the tokens under the loss highlighted: in colour on a terminal, in [[…]] elsewhere."""
    from itertools import islice

    kind, loaded = load(_source(args.file, args.format), args.kind)
    formatter = load_formatter(args.tokenizer, args.template)
    marks = ("\x1b[30;42m", "\x1b[0m") if sys.stdout.isatty() else ("[[", "]]")
    facts = formatter.facts()
    tool_rows = _tool_rows(loaded.rows)
    print(f"{args.file}: {len(loaded.rows)} {kind}{f' ({tool_rows} with tool turns)' if tool_rows else ''}; template {facts['template']}, eos {facts['eos_ids']}, pad {facts['pad_id']}")
    for row in islice(loaded.rows, max(args.n, 0)):
        print(f"\n--- {row.where}")
        for title, text, tokens, covered in rendered(formatter, row, marks, args.loss_on):
            print(f"{title}({tokens} tokens, the loss covers {covered})\n{text}")
    return 0


def _source(file: str, format: str) -> Source:
    from configs.schema.common import Source

    return Source.model_validate({"path": file, "format": format})


def load(source: Source, kind: Kind | None) -> tuple[Kind, Loaded[Any]]:
    """Read `source` as `kind`, or else as what its first row's columns say. Raises UserError for what cannot be used."""
    from stages.data.files import read_records
    from stages.data.read import read_rows

    if kind is None:
        first = next(read_records(source.model_copy(update={"limit": 1}), []), None)
        columns = set(first.fields) if first else set()
        kind = "demonstrations"
        if {"chosen", "rejected"} <= columns:
            kind = "pairs"
        elif source.format == "text" or columns == {"text"} or _only_prompts(columns):
            kind = "prompts"
    return kind, read_rows(kind, [source])


def _only_prompts(columns: set[str]) -> bool:
    """Prompts beside no column that an answer could stand in; anything less clear is read as demonstrations, and so explained."""
    named = bool(columns & {"prompt", "text"})
    return named and not columns & {"completion", "messages", "conversations", "instruction", "role", "response", "output", "answer"}


def describe(kind: Kind, loaded: Loaded[Any]) -> dict[str, Any]:
    """Counts, lengths in words and warnings of one file, as JSON."""
    from stages.data import fingerprint, group_key
    from stages.data.rows import Demonstration, PreferencePair

    rows: Sequence[Row] = loaded.rows
    lengths: dict[str, list[int]] = {"prompt": [_words(row.prompt) for row in rows]}
    for row in rows:
        if isinstance(row, Demonstration):
            lengths.setdefault("completion", []).append(len(row.completion.split()))
        elif isinstance(row, PreferencePair):
            lengths.setdefault("chosen", []).append(len(row.chosen.split()))
            lengths.setdefault("rejected", []).append(len(row.rejected.split()))
    groups, tool_rows = Counter(group_key(row.prompt) for row in rows), _tool_rows(rows)
    report = loaded.report.as_dict()
    return {
        "kind": kind,
        "format": report["sources"][0]["format"],
        "rows": report["rows"],
        "prompt_groups": len(groups),
        "repeated_prompts": len(rows) - len(groups),
        "duplicates": report["duplicates"],
        "equal_pairs": report["equal_pairs"],
        "placeholders": report["placeholders"],
        **({"tool_rows": tool_rows} if tool_rows else {}),
        "words": {name: summary(values) for name, values in lengths.items()},
        "fingerprint": fingerprint(rows),
        "warnings": report["warnings"],
    }


def _tool_rows(rows: Sequence[Row]) -> int:
    from stages.data.rows import Demonstration
    from stages.data.tools import has_tools

    return sum(isinstance(row, Demonstration) and has_tools(row) for row in rows)


def _words(messages: Messages) -> int:
    return sum(len(message.content.split()) for message in messages)


def summary(values: Sequence[int]) -> dict[str, float]:
    """Shortest, median, 95th percentile (nearest rank) and longest."""
    ordered = sorted(values)
    rank = -(-95 * len(ordered) // 100) - 1
    return {"min": ordered[0], "median": statistics.median(ordered), "p95": ordered[rank], "max": ordered[-1]}


def _print_result(result: dict[str, Any]) -> None:
    if not result["ok"]:
        print(f"{result['file']}: cannot be used\n  {printable(result['error'])}", file=sys.stderr)
        return
    print(f"{result['file']}: {result['rows']} {result['kind']} ({result['format']}), {result['prompt_groups']} different prompts")
    if "tool_rows" in result:
        print(f"  rows with tool turns or `tools`: {result['tool_rows']}")
    for name, words in result["words"].items():
        print(f"  words in {name}: {words['min']} to {words['max']}, median {words['median']:g}, 95 % up to {words['p95']}")
    for warning in result["warnings"]:
        print(f"  warning: {printable(warning)}")


def load_formatter(tokenizer_path: str, template: str) -> Formatter:
    """The formatter a stage would use with this folder. Raises UserError when there is no tokenizer in it."""
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    from configs.errors import UserError
    from stages import foreign
    from stages.data import Formatter, ensure_special_tokens

    if Path(tokenizer_path).is_dir():
        foreign.check_folder(Path(tokenizer_path))
    try:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_path, trust_remote_code=False)  # None, the default, would ask on the terminal
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"--tokenizer {tokenizer_path}: no tokenizer could be loaded ({reason}); give a Hugging Face folder") from None
    model_configs: list[Any] = []
    read: Callable[[str], Any]
    for read in (partial(AutoConfig.from_pretrained, trust_remote_code=False), GenerationConfig.from_pretrained):
        try:
            model_configs.append(read(tokenizer_path))
        except (OSError, ValueError):
            continue  # a folder with nothing but a tokenizer
    special = ensure_special_tokens(tokenizer, *model_configs)
    return Formatter(tokenizer, template, special.eos_ids)


def rendered(
    formatter: Formatter, row: Demonstration | PreferencePair | Prompt, marks: tuple[str, str], loss_on: str
) -> list[tuple[str, str, int, int]]:
    """(title, text with marks around what the loss covers, tokens, tokens covered) of one row; two of them for a pair."""
    from stages.data import Demonstration, PreferencePair

    if isinstance(row, Demonstration):
        encoded = formatter.demonstration(row, loss_on)
        views = [("", encoded["input_ids"], encoded["completion_mask"])]
    elif isinstance(row, PreferencePair):
        pair = formatter.pair(row)
        views = [
            (f"{name} ", pair["prompt_ids"] + pair[f"{name}_ids"], [0] * len(pair["prompt_ids"]) + [1] * len(pair[f"{name}_ids"]))
            for name in ("chosen", "rejected")
        ]
    else:
        ids = formatter.prompt_ids(row.prompt)
        views = [("", ids, [0] * len(ids))]
    return [(title, highlight(formatter, ids, mask, marks), len(ids), sum(mask)) for title, ids, mask in views]


def highlight(formatter: Formatter, ids: Sequence[int], mask: Sequence[int], marks: tuple[str, str]) -> str:
    """The decoded ids with `marks` around every run of ids under the mask.

    Runs are cut out of the decoded whole, since decoding a run alone loses its leading space with some tokenizers.
    """
    text, start = "", 0
    shown = 0
    for end in range(1, len(ids) + 1):
        if end < len(ids) and mask[end] == mask[start]:
            continue
        upto = formatter.decode(ids[:end])
        piece, shown = printable(upto[shown:]), len(upto)
        text += f"{marks[0]}{piece}{marks[1]}" if mask[start] else piece
        start = end
    return text
