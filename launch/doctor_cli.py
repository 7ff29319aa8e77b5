"""`align doctor`: examines the machine and says what stands in the way of training.

Exit codes: 0 no check failed (warnings may stand); 1 a check failed.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path


def add_parser(verbs: argparse._SubParsersAction) -> None:
    """Add the verb `doctor`."""
    parser = verbs.add_parser(
        "doctor",
        help="examine this machine: versions, devices, network, disks, and a tiny training run",
        description="Examines versions, devices, interconnect, threads, shared memory, disks, limits, offline state, the registry, gloo and NCCL, the compiler, and trains a tiny model. "
        "Prints what to do about each problem, and a block for a bug report with secrets taken out. Nothing is fetched from a network.",
        epilog="Exit code 0: no check failed (warnings may stand); 1: a check failed.",
    )
    parser.add_argument("--registry", type=Path, metavar="DIR", help="the registry to look at (default: runs/registry, if it is there)")
    parser.add_argument("--quick", action="store_true", help="only what takes no other process: no torch, no gloo and NCCL, no self-test, less writing")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    parser.set_defaults(handler=run)


def run(args: argparse.Namespace) -> int:
    """Run the checks, print, return the exit code."""
    from launch.doctor.check import Settings
    from launch.doctor.checks import examine
    from launch.doctor.redact import Redactor
    from launch.doctor.report import as_json, redacted, show, worst

    settings = Settings((args.registry or Path("runs/registry")).expanduser(), named=args.registry is not None, quick=args.quick)
    live = sys.stderr.isatty()
    say = (lambda name: print(f"\r\033[Kchecking {name} …", end="", file=sys.stderr, flush=True)) if live else (lambda _: None)
    results, left_out = examine(settings, say=say)
    if live:
        print("\r\033[K", end="", file=sys.stderr, flush=True)
    results = redacted(results, Redactor())
    if args.json:
        print(json.dumps(as_json(results, left_out), ensure_ascii=False))
    else:
        show(results, left_out)
    return 1 if worst(results) == "failed" else 0
