"""`align adapters list|combine`: the adapters of a registry by their base, and new ones composed of them."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from configs.printable import printable

HOW = """\
how                of updates ΔW = B·A and weights w
  cat              Σ w·ΔW exactly; the rank is the sum of the ranks (default)
  svd              the best approximation of Σ w·ΔW at a rank
  linear           adds A to A and B to B: cheap and rough, at one rank (IA3: exact, the only one)
  ties             leaves out small entries, elects a sign and averages what agrees with it
  dare_linear      leaves out entries at random (--seed), rescales the rest, adds them up; dare_ties: then elects signs
  magnitude_prune  leaves out small entries, adds up the rest
with _svd (ties_svd, dare_ties_svd, …) on the updates themselves, also for different ranks; else on A and B apart, at one rank
"""


def add_parser(verbs: argparse._SubParsersAction) -> None:
    """Add the verb `adapters`."""
    parser = verbs.add_parser("adapters", help="list the adapters of each base and compose new ones", description="Several adapters of one base.")
    commands = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    command = _command(commands, "list", _list, "base, technique, rank, trainable parameters, size and metrics of every adapter")
    command.add_argument("--base", metavar="REF", help="only those on this base: a registry name, a folder or a hub name")

    command = _command(commands, "combine", _combine, "compose adapters of one base into a new adapter checkpoint")
    command.epilog, command.formatter_class = HOW, argparse.RawDescriptionHelpFormatter
    command.add_argument("refs", nargs="+", metavar="REF", help="adapter checkpoints, such as sft/a sft/b@2")
    command.add_argument("--as", dest="family", required=True, metavar="STAGE/NAME", help="what the new adapter is published as, such as sft/ab")
    command.add_argument("--weights", nargs="+", type=float, default=(), metavar="W", help="a weight for each; may be negative (default: equal shares of 1)")
    command.add_argument("--how", default="cat", metavar="METHOD", help="see below (default: cat)")
    command.add_argument("--density", type=float, metavar="D", help="share of the entries that ties, dare and magnitude_prune keep, above 0 and up to 1")
    command.add_argument("--rank", type=int, metavar="R", help="rank of the result of svd and the _svd methods (default: the largest of the parents')")
    command.add_argument("--sign", choices=["total", "frequency"], default="total", help="the sign that ties elects: that of the sum, or of the majority (default: total)")
    command.add_argument("--seed", type=int, default=0, metavar="N", help="seed of what dare leaves out (default: 0)")


def _command(commands: Any, name: str, run: Any, line: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=line, description=f"{line[0].upper()}{line[1:]}.")
    parser.add_argument("--registry", type=Path, default=Path("runs/registry"), metavar="DIR", help="default: runs/registry")
    parser.add_argument("--json", action="store_true", help="print one JSON value")
    parser.set_defaults(handler=run)
    return parser


def _list(args: argparse.Namespace) -> int:
    """One row for each adapter, those of one base together."""
    from launch.registry.output import print_json, size, table
    from stages.adapters.facts import listed
    from stages.registry import Registry

    found = listed(Registry(args.registry, create=False), args.base)
    if args.json:
        print_json([one.to_json() for one in found])
        return 0
    if not found:
        print(f"no adapters{f' on {args.base}' if args.base else ''} in {args.registry}; a stage trains one with `lora: {{rank: 16}}`")
        return 0
    head = ("ADAPTER", "BASE", "TECHNIQUE", "RANK", "TRAINABLE", "SIZE", "METRICS")
    rows = [
        (one.checkpoint.ref, one.base, one.facts.technique + (f" ({one.how})" if one.how else ""), str(one.facts.rank or "-"), f"{one.facts.trained:,}", size(one.facts.size), _metrics(one.checkpoint.info("metrics")))
        for one in found
    ]  # fmt: skip
    print("\n".join(table([head, *rows])))
    return 0


def _metrics(found: dict[str, Any] | None) -> str:
    numbers = {key: value for key, value in (found or {}).items() if isinstance(value, (int, float)) and not isinstance(value, bool)}
    return ", ".join(f"{key} {value:.4g}" for key, value in list(numbers.items())[:4]) or "-"


def _combine(args: argparse.Namespace) -> int:
    """Compose, publish, and say what came of it."""
    from launch.registry.output import print_json, size
    from stages.adapters.combine import Method, combine
    from stages.registry import Registry

    method = Method(args.how, tuple(args.weights), args.density, args.rank, args.sign, args.seed)
    made = combine(Registry(args.registry, create=False), args.refs, args.family, method, say=lambda line: print(printable(line), file=sys.stderr))
    record = made.info("stage_info")["combined"]
    if args.json:
        print_json({"ref": made.ref, "id": made.id, "path": str(made.path), "size": made.size, "combined": record})
    else:
        print(f"published {made.ref} ({made.id}, {size(made.size)}), rank {record['result_rank'] or '-'}; now: align eval {made.ref} …, align chat {made.ref}, or init_from: {made.ref}")
    return 0
