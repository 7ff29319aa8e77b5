"""`align plan`: memory, time and disk of every stage before it starts, without loading weights."""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

from configs.errors import UserError


def add_parser(verbs: argparse._SubParsersAction) -> None:
    """Add the verb `plan`."""
    parser = verbs.add_parser(
        "plan",
        help="memory, time and disk of every stage before it starts",
        description="Plans a chain, or one stage's config, from the model's config.json and the data: no weights are loaded.",
    )
    parser.add_argument("config", metavar="CHAIN.yaml", help="a chain file, or the config of one stage")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="replaces a key of the file, such as sft.train.micro_batch_size=2")
    parser.add_argument("--gpus", metavar="NxDEVICE", help="GPUs of one node, such as 8x80GB or 4xH100 (default: those of this machine, else 1xCPU)")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="number of nodes (default: 1)")
    parser.add_argument("--machine", metavar="X", help="machine file: a name in configs/accelerate or a path (default: the config's)")
    parser.add_argument("--only", metavar="STAGE", choices=["sft", "reward", "dpo", "ppo"], help="just this stage")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    parser.set_defaults(handler=run)


def run(args: argparse.Namespace) -> int:
    """Plan and print. Exit code 0 whether it fits or not."""
    from configs.load import load
    from launch.config_cli import guess_kind

    gpus, device = devices(args.gpus)
    if args.nodes < 1:
        raise UserError(f"--nodes: found {args.nodes}; expected 1 or more")
    kind = guess_kind(args.config)
    config = load(args.config, kind, args.overrides)
    with quiet():
        from launch.plan.make import plan
        from launch.plan.report import record

        plans, notes = plan(config, kind, gpus=gpus, device=device, nodes=args.nodes, machine=args.machine, only=args.only)
    if args.json:
        print(json.dumps({"stages": [record(p) for p in plans], "notes": notes}))
        return 0
    from rich.console import Console

    from launch.plan.table import show

    show(plans, notes, Console(width=None))
    return 0


def devices(spec: str | None) -> tuple[int, Any]:
    """(GPUs of one node, the device): what was asked for, else what this machine has."""
    from configs.machines import count_gpus
    from launch.machine_choice import gpu_memory
    from launch.plan.gpus import parse_gpus

    if spec is not None:
        return parse_gpus(spec)
    memory = gpu_memory()
    return parse_gpus(f"{count_gpus()}x{round(memory / 2**30)}GB") if memory else parse_gpus("1xcpu")


@contextmanager
def quiet() -> Iterator[None]:
    """Within the block stdout is stderr (DeepSpeed logs there when it is imported), and libraries do not warn of models without weights."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    with warnings.catch_warnings(), redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        yield
