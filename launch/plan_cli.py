"""`align plan`: memory, time and disk of every stage before it starts, without loading weights."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from typing import Any

from configs.errors import UserError

PLANNED = ("sft", "reward", "dpo", "ppo", "chain")


def add_parser(verbs: argparse._SubParsersAction) -> None:
    """Add the verb `plan`."""
    parser = verbs.add_parser(
        "plan",
        help="memory, time and disk of every stage before it starts",
        description="Plans a chain, or one stage's config, from the model's config.json and the data: no weights are loaded.",
    )
    parser.add_argument("config", metavar="CHAIN.yaml", help="a chain file, or the config of one stage")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="replaces a key of the file, such as sft.train.micro_batch_size=2")
    parser.add_argument("--kind", choices=PLANNED, help="what the config is, where its keys and its name do not tell")
    parser.add_argument("--gpus", metavar="NxDEVICE", help="GPUs of one node, such as 8x80GB or 4xH100, or 2xCPU (default: those of this machine, else a CPU for each of the config's processes)")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="number of nodes (default: 1)")
    parser.add_argument("--node-memory", metavar="GB", help="main memory of a node, such as 1024GB: what is offloaded must fit in it (default: it is not checked)")
    parser.add_argument("--machine", metavar="X", help="machine file: a name in configs/accelerate or a path (default: the config's)")
    parser.add_argument("--only", metavar="STAGE", choices=["sft", "reward", "dpo", "ppo"], help="just this stage")
    parser.add_argument("--fit", metavar="OUT.yaml", help="choose machine file, checkpointing and micro-batch that fit, at the same batch, and write them into OUT.yaml")
    parser.add_argument("--measure", action="store_true", help="run a few steps of each stage here, and correct memory and time by them")
    parser.add_argument("--scale", metavar="N,N,…", help="time on so many GPUs, such as 8,64,512")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    parser.set_defaults(handler=run)


def run(args: argparse.Namespace) -> int:
    """Plan and print. Exit code 0 whether it fits or not."""
    from configs.load import load
    from launch.config_cli import guess_kind

    counts = _counts(args.scale)
    if args.fit and args.machine:
        raise UserError("--fit chooses the machine file; leave --machine out")
    if args.fit and os.path.exists(args.fit):
        raise UserError(f"--fit: {args.fit} exists; give a name that is free")
    if args.nodes < 1:
        raise UserError(f"--nodes: found {args.nodes}; expected 1 or more")
    kind = args.kind or guess_kind(args.config)
    config = load(args.config, kind, args.overrides)
    gpus, device = devices(args.gpus, getattr(config, "processes", None))
    device = replace(device, node_memory=_node_memory(args.node_memory))
    with quiet():
        plans, notes = _plans(args, config, kind, gpus, device)
        if args.measure:
            from launch.plan.correct import corrected

            plans = [corrected(planned) for planned in plans]
        scaled = _scaled(plans, counts)
    if args.json:
        from launch.plan.report import record
        from launch.plan.table import assumed

        print(json.dumps({"stages": [record(p) for p in plans], "notes": [*notes, *assumed(plans)]} | ({"scale": scaled} if counts else {}) | ({"config": args.fit} if args.fit else {})))
        return 0
    from rich.console import Console

    from launch.plan.table import show, show_scale

    console = Console(width=None)
    show(plans, notes, console)
    show_scale(scaled, console)
    if args.fit:
        print(f"wrote {args.fit}")
    return 0


def _plans(args: argparse.Namespace, config: Any, kind: str, gpus: int, device: Any) -> tuple[list[Any], list[str]]:
    """The plan of every stage as configured, or as `--fit` chose it, which is then written."""
    if not args.fit:
        from launch.plan.make import plan

        return plan(config, kind, gpus=gpus, device=device, nodes=args.nodes, machine=args.machine, only=args.only)
    from configs.load import save
    from launch.plan.fit import fitted

    new, plans, notes = fitted(config, kind, gpus=gpus, device=device, nodes=args.nodes, only=args.only)
    save(new, args.fit)
    return plans, notes


def _node_memory(text: str | None) -> int:
    """Bytes of `--node-memory`; 0 where it is not given."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(g(i)?b?)?", text.strip(), re.IGNORECASE) if text is not None else None
    if text is not None and found is None:
        raise UserError(f"--node-memory: found {text!r}; expected gigabytes, such as 1024GB")
    return int(float(found[1]) * (2**30 if found[3] else 10**9)) if found else 0


def _counts(text: str | None) -> list[int]:
    """The numbers of GPUs of `--scale`."""
    try:
        counts = [int(word) for word in text.split(",")] if text else []
    except ValueError:
        counts = [0]
    if any(count < 1 for count in counts):
        raise UserError(f"--scale: found {text!r}; expected numbers of GPUs of 1 or more, such as 8,64,512")
    return counts


def _scaled(plans: list[Any], counts: list[int]) -> list[dict[str, Any]]:
    """Time of each stage on each number of GPUs."""
    if not counts:
        return []
    from launch.plan.timing import facts_of, hardware_of
    from launch.scale import overlapped, scale

    found = []
    for p in plans:
        facts, hardware = facts_of(p.work, p.layout), hardware_of(p.layout.device)
        for row in scale(facts, counts, hardware):
            apart = overlapped(facts, row.gpus, hardware)
            found.append({
                "stage": p.work.stage, "gpus": row.gpus, "nodes": row.nodes, "step_seconds": row.seconds, "tokens_per_second": row.tokens_per_second,
                "hours": row.hours * p.work.members if p.work.steps else None, "efficiency": row.efficiency, "bound": row.bound, "notes": list(row.notes),
                "overlapped": apart and {"rollout_share": apart[0], "step_seconds": apart[1]},
            })  # fmt: skip
    return found


def devices(spec: str | None, processes: int | None = None) -> tuple[int, Any]:
    """(GPUs of one node, the device): what was asked for, else what this machine has; without a GPU a CPU for each of `processes`.

    A CPU's memory is each process's share of this machine's, or of its container's.
    """
    from configs.machines import count_gpus
    from launch.doctor.processors import usable_memory
    from launch.machine_choice import gpu_memory
    from launch.plan.gpus import parse_gpus

    memory = gpu_memory() if spec is None else 0
    count, device = parse_gpus(spec or (f"{count_gpus()}x{round(memory / 2**30)}GB" if memory else f"{processes or 1}xcpu"))
    return count, device if device.gpu else replace(device, memory=usable_memory() // count)


@contextmanager
def quiet() -> Iterator[None]:
    """Within the block stdout is stderr (DeepSpeed logs there when it is imported), and libraries do not warn of models without weights."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    with warnings.catch_warnings(), redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        yield
