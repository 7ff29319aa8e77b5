"""The `align` command: finds the verb, loads only that verb's code, and turns errors into exit codes.

Exit codes: 0 done; 2 something the user can mend (`error: …` on stderr); 130 interrupted; else what a child process ended with.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from configs.errors import UserError
from configs.printable import printable

# verb -> (module with add_parser(subparsers), help line). `align --help` imports none of these modules.
VERBS = {
    "demo": ("launch.demo_cli", "build a small world and align a model in it: offline, on a CPU, in minutes"),
    "run": ("launch.run_cli", "run a chain of stages from one YAML file"),
    "sweep": ("launch.sweep_cli", "try values of any fields of a chain or a stage, and say which are best"),
    "plan": ("launch.plan_cli", "memory, time and disk of every stage before it starts"),
    "sft": ("launch.stage_cli", "fine-tune a model on demonstrations"),
    "reward": ("launch.stage_cli", "train a reward model on preference pairs"),
    "dpo": ("launch.stage_cli", "optimise a policy on preference pairs directly"),
    "ppo": ("launch.stage_cli", "optimise a policy against a scorer with PPO"),
    "eval": ("launch.eval_cli", "measure and compare checkpoints on held-out prompts"),
    "chat": ("launch.chat_cli", "talk to policies in the terminal: switch between them, compare their answers"),
    "adapters": ("launch.adapters_cli", "list the adapters of each base and compose new ones"),
    "slurm": ("launch.slurm_cli", "write sbatch scripts that run a chain on many nodes"),
    "k8s": ("launch.k8s_cli", "write a Kubernetes manifest that runs a chain on many nodes"),
    "data": ("launch.data_cli", "check data files and show what the stages make of them"),
    "registry": ("launch.registry_cli", "list, verify, name, collect, import and export checkpoints"),
    "launch": ("launch.launch_cli", "show machine files and the accelerate launch command a config gets"),
    "doctor": ("launch.doctor_cli", "examine this machine: versions, devices, network, disks, and a tiny training run"),
    "config": ("launch.config_cli", "explain configuration keys and print their schema"),
}


def version() -> str:
    """The installed version of this project."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    try:
        return installed("align-stack")
    except PackageNotFoundError:
        return "0+uninstalled"


class _Version(argparse.Action):
    """Looks the version up only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object, **__: object) -> None:
        print(f"align {version()}")
        parser.exit(0)


def build_parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """The parser for `argv`: complete for the verb named there, a name and a help line for the others."""
    parser = argparse.ArgumentParser(prog="align", description="SFT, reward model, PPO and DPO: from a base model to an aligned one.")
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", title="verbs", required=True)
    wanted = next((word for word in argv if not word.startswith("-")), None)
    module = VERBS[wanted][0] if wanted in VERBS else None
    if module is not None:
        importlib.import_module(module).add_parser(verbs)
    for verb, (owner, line) in VERBS.items():
        if owner != module:
            verbs.add_parser(verb, help=line)
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The parsed command line. `key=value` may stand anywhere: argparse gives back those that come after an option."""
    parser = build_parser(argv)
    args, rest = parser.parse_known_args(argv)
    if rest and (not hasattr(args, "overrides") or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}; see: align {args.verb} --help")
    if rest:
        args.overrides = [*args.overrides, *rest]
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run one `align` command and return its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        # Set before any library is imported: TRL and transformers report usage when objects are constructed.
        os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
        # Threads that spin while they wait made an evaluation beside other jobs five times slower.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        args = parse(argv)
        handler = getattr(args, "handler", None) or args.func
        return int(handler(args) or 0)
    except UserError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader (such as `head`) has gone. Point stdout elsewhere, or the interpreter complains when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
