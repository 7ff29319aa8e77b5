"""`align sft --compare`: which technique costs what on one model and its data."""

from __future__ import annotations

import argparse
import json
import sys

STEPS = 12


def add_option(parser: argparse.ArgumentParser) -> None:
    """The options of a comparison."""
    parser.add_argument("--compare", action="store_true", help="train every technique for a few steps, print a table of what each costs, publish nothing; --config is optional")
    parser.add_argument("--techniques", metavar="A,B", help="with --compare: only these, such as full,lora,ia3")
    parser.add_argument("--steps", type=int, default=STEPS, metavar="N", help=f"with --compare: optimizer steps of each (default: {STEPS})")


def run(args: argparse.Namespace) -> int:
    """Measure, then print a table, or with --json a list of objects."""
    from configs.errors import UserError
    from launch.compare.run import compare
    from launch.compare.table import table
    from launch.compare.techniques import TECHNIQUES

    if args.dry_run or args.machine or args.processes or args.nodes or args.continued:
        raise UserError("--compare runs each technique in one process here; leave --dry-run, --machine, --processes, --nodes and --continue out")
    names = [name.strip() for name in args.techniques.split(",") if name.strip()] if args.techniques else list(TECHNIQUES)
    rows = compare(args.config, args.overrides, names, args.steps, lambda text: print(text, file=sys.stderr, flush=True))
    if args.json:
        print(json.dumps(rows))
    else:
        from rich.console import Console

        Console().print(table(rows, args.steps, args.config or "a small built-in model"))
    return 0 if any("reason" not in row for row in rows) else 2
