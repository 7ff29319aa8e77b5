"""`align run`: a chain of stages from one YAML file."""

from __future__ import annotations

import argparse


def add_parser(verbs: argparse._SubParsersAction) -> None:
    """Add the verb `run`."""
    from configs.allowed import add_option
    from launch.nodes import add_options

    parser = verbs.add_parser(
        "run",
        help="run a chain of stages from one YAML file",
        description="Runs what has not been done, continues what was interrupted, skips what is published and unchanged. "
        "On several nodes, node 0 decides that, prepares and evaluates; the others start each stage with it.",
        epilog="Keys, units and defaults: align config explain chain",
    )
    parser.add_argument("chain", metavar="CHAIN.yaml", help="the chain file, such as configs/chains/demo.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="replaces a key of the file, such as sft.train.epochs=2")
    which = parser.add_mutually_exclusive_group()
    stages = ["sft", "reward", "dpo", "ppo", "eval"]
    which.add_argument("--only", metavar="STAGE", choices=stages, help=f"just this stage and its preparation: {', '.join(stages)}")
    which.add_argument("--from", dest="start", metavar="STAGE", choices=stages, help="this stage and all after it again, even if done")
    add_options(parser)
    add_option(parser)
    parser.add_argument("--dry-run", "--print-command", action="store_true", help="print what would run and why, with the commands; start nothing")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout; logs go to stderr")
    parser.set_defaults(handler=run)


def run(args: argparse.Namespace) -> int:
    """Check the chain, run its steps, print what came out. Returns the exit code of the step that failed, else 0."""
    from launch.chain.asked import machine_overrides
    from launch.chain.runner import run_chain
    from launch.nodes import nodes_of

    nodes = nodes_of(args, {}, ships=True)
    overrides = machine_overrides(args.chain, args.overrides, args.machine, args.processes)
    return run_chain(args.chain, overrides, only=args.only, start=args.start, dry_run=args.dry_run, as_json=args.json, nodes=nodes, allow_changed=args.allow_changed)
