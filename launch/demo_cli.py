"""`align demo`: the built-in chain of the small customer-support world, run by the same code as `align run`."""

from __future__ import annotations

import argparse
from pathlib import Path

CHAIN = Path("configs") / "chains" / "demo.yaml"
# Everything smaller: shows that all steps work together, in about a minute; the figures mean little.
SMOKE = [
    "prepare.base.with.steps=100", "prepare.data.with.pairs_rows=500", "prepare.data.with.prompts_rows=1500",
    "sft.train.epochs=1", "reward.train.epochs=1", "ppo.train.iterations=4", "ppo.train.rollout_batch_size=96", "eval.max_prompts=60",
]  # fmt: skip


def add_parser(verbs: argparse._SubParsersAction) -> None:
    """Add the verb `demo`."""
    parser = verbs.add_parser(
        "demo",
        help="build a small world and align a model in it: offline, on a CPU, in minutes",
        description="Makes data and a small base model, then SFT, a reward model, DPO, PPO and an evaluation on held-out prompts. "
        "It is the chain configs/chains/demo.yaml; what is done already is skipped.",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="replaces a key of the chain, such as ppo.kl_coef=0.1"
    )
    parser.add_argument(
        "--smoke", action="store_true", help="everything smaller: all steps in about a minute"
    )
    parser.add_argument(
        "--seed", type=int, metavar="N", help="seed of the world, of the base model and of every stage (default 0)"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="working folder (default runs/demo)")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout; logs go to stderr")
    parser.set_defaults(handler=run)


def overrides_of(args: argparse.Namespace) -> list[str]:
    """The chain's overrides that the options stand for; those the user gives come last and win."""
    overrides = list(SMOKE) if args.smoke else []
    if args.seed is not None:
        overrides.append(f"seed={args.seed}")
    if args.output is not None:
        overrides.append(f"output={args.output}")
    return overrides + args.overrides


def run(args: argparse.Namespace) -> int:
    """Run the demo's chain. Returns the exit code of the step that failed, else 0."""
    import configs
    from launch.chain.runner import run_chain

    chain = CHAIN if CHAIN.is_file() else Path(next(iter(configs.__path__))) / "chains" / "demo.yaml"
    return run_chain(str(chain), overrides_of(args), as_json=args.json)
