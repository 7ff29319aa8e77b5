"""`align sft --compare`: which technique costs what on one model and its data."""

from __future__ import annotations

import argparse
import json
import sys

from launch.compare.techniques import TECHNIQUES

STEPS = 12
NOT_WITH = ("dry_run", "machine", "processes", "nodes", "continued", "data", "new_name", "merge", "plain_text", "rehearse", "registry", "find_lr", "lr_range")


def add_option(parser: argparse.ArgumentParser) -> None:
    """The options of a comparison."""
    parser.add_argument("--compare", action="store_true", help="train every technique for a few steps, print a table of what each costs, publish nothing; --config is optional")
    parser.add_argument("--techniques", metavar="A,B", help=f"with --compare: only these, such as full,lora,ia3; of {', '.join(TECHNIQUES)}")
    parser.add_argument("--steps", type=int, metavar="N", help=f"with --compare: optimizer steps of each (default: {STEPS})")


def is_asked(args: argparse.Namespace) -> bool:
    """Whether to compare. Raises UserError for options of a comparison that is not asked for."""
    if getattr(args, "compare", False):
        return True
    if alone := [f"--{name}" for name in ("techniques", "steps") if getattr(args, name, None) is not None]:
        from configs.errors import UserError

        raise UserError(f"{', '.join(alone)}: goes with --compare; the steps of a run are train.max_steps=N")
    return False


def run(args: argparse.Namespace) -> int:
    """Measure, then print a table, or with --json a list of objects."""
    from configs.errors import UserError
    from launch.compare.run import compare
    from launch.compare.table import show

    if found := [f"--{name.replace('_', '-')}" for name in NOT_WITH if getattr(args, name)]:
        shown = ", ".join({"--continued": "--continue", "--new-name": "--as"}.get(option, option) for option in found)
        raise UserError(f"--compare trains each technique for a few steps in one process here; leave {shown} out")
    steps = STEPS if args.steps is None else args.steps
    names = [name.strip() for name in args.techniques.split(",") if name.strip()] if args.techniques else list(TECHNIQUES)
    rows = compare(args.config, args.overrides, names, steps, lambda text: print(text, file=sys.stderr, flush=True))
    if args.json:
        print(json.dumps(rows))
    else:
        from rich.console import Console

        show(rows, steps, args.config or "a small built-in model", Console())
    return 0 if any("reason" not in row for row in rows) else 2
