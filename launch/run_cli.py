"""`align run`: a chain of stages from one YAML file."""

from __future__ import annotations

import argparse

from configs.errors import UserError


def add_parser(verbs: argparse._SubParsersAction) -> None:
    """Add the verb `run`."""
    from launch.nodes import add_options

    parser = verbs.add_parser(
        "run",
        help="run a chain of stages from one YAML file",
        description="Runs what has not been done, continues what was interrupted, skips what is published and unchanged.",
        epilog="Keys, units and defaults: align config explain chain",
    )
    parser.add_argument("chain", metavar="CHAIN.yaml", help="the chain file, such as configs/chains/demo.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="replaces a key of the file, such as sft.train.epochs=2")
    which = parser.add_mutually_exclusive_group()
    stages = ["sft", "reward", "dpo", "ppo", "eval"]
    which.add_argument("--only", metavar="STAGE", choices=stages, help=f"just this stage and its preparation: {', '.join(stages)}")
    which.add_argument("--from", dest="start", metavar="STAGE", choices=stages, help="this stage and all after it again, even if done")
    add_options(parser)
    parser.add_argument("--dry-run", "--print-command", action="store_true", help="print what would run and why, with the commands; start nothing")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout; logs go to stderr")
    parser.set_defaults(handler=run)


def run(args: argparse.Namespace) -> int:
    """Check the chain, run its steps, print what came out. Returns the exit code of the step that failed, else 0."""
    from launch.chain.runner import run_chain

    if args.nodes is not None and args.nodes != 1:
        raise UserError(
            f"--nodes {args.nodes}: a chain runs from one node, which decides what to skip and what to continue; for several nodes write a "
            f"job with: align slurm {args.chain} --nodes {args.nodes} (it starts each stage on all nodes), or start the stages one by one with "
            "align sft|reward|dpo|ppo --nodes"
        )
    overrides = [*args.overrides, *(f"{key}={value}" for key, value in (("machine", args.machine), ("processes", args.processes)) if value is not None)]
    return run_chain(args.chain, overrides, only=args.only, start=args.start, dry_run=args.dry_run, as_json=args.json)
