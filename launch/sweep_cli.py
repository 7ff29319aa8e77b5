"""`align sweep`: trials of a chain or a stage that differ in some fields, and the table of what came out."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from launch.sweep.setting import Setting

EXAMPLES = """examples:
  align sweep support.yaml                            the learning rate of the first stage, 12 trials, the bad ones ended early
  align sweep support.yaml --space sft.train.learning_rate=1e-5..1e-3:log --space sft.lora.rank=4,8,16 --trials 20 --jobs 2
  align sweep support.yaml --space ppo.kl_coef=0.01..0.3:log --metric eval/ppo/score --sampler random
  align sweep show runs/support/sweep                 the table and the plots of a sweep, also while it runs

Run it again after an interruption and it goes on. Keys, units and defaults: align config explain sweep"""


def add_parser(verbs: argparse._SubParsersAction) -> None:
    """Add the verb `sweep`."""
    parser = verbs.add_parser(
        "sweep", help="try values of any fields of a chain or a stage, and say which are best", epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Runs a chain (or one stage) with different values of some of its fields, ends bad trials early, and writes the best config.\nWhat no swept field changes is trained once.",
    )  # fmt: skip
    parser.add_argument("chain", metavar="CHAIN.yaml", help="a chain's or a stage's file; or `show`, followed by a sweep's folder")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="replaces a key of the file in every trial")
    parser.add_argument("--space", action="append", default=[], metavar="KEY=VALUES", help="LOW..HIGH, LOW..HIGH:log, LOW..HIGH:step=S or A,B,C; can be repeated (default: see above)")
    parser.add_argument("--metric", metavar="NAME", help="evaluation/loss, sft/token_accuracy, eval/ppo/score … (default: what the stage's evaluation.metric says, else its validation loss)")
    parser.add_argument("--stage", choices=["sft", "reward", "dpo", "ppo", "eval"], help="the stage that the metric is of; of a stage's file whose keys do not tell, which stage it is")
    parser.add_argument("--goal", choices=["min", "max"], help="default: told by the metric's name")
    parser.add_argument("--trials", type=int, metavar="N", help="trials in all (default 12); more of them go on with a finished sweep")
    parser.add_argument("--jobs", type=int, metavar="N", help="trials at once, each with its share of GPUs or threads (default 1)")
    parser.add_argument("--sampler", choices=["tpe", "random", "grid"], help="what draws the values (default tpe)")
    parser.add_argument("--pruner", choices=["halving", "median", "none"], help="what ends bad trials early (default halving)")
    parser.add_argument("--seed", type=int, metavar="N", help="seed of the draws (default 0)")
    parser.add_argument("--timeout", type=float, metavar="MINUTES", help="begin no further trial after so long")
    parser.add_argument("--keep", type=int, metavar="K", help="keep the published checkpoints of the best K trials only")
    parser.add_argument("--output", metavar="PATH", help="the sweep's folder (default: OUTPUT/sweep of the chain)")
    parser.add_argument("--sweep", metavar="FILE", help="a YAML file with the keys of a chain's `sweep:` section")
    parser.add_argument("--retry-failed", action="store_true", help="try the values of failed trials again")
    parser.add_argument("--machine", metavar="NAME", help="machine file of every stage: a name in configs/accelerate, a path, or auto")
    parser.add_argument("--processes", type=int, metavar="N", help="processes of every stage")
    parser.add_argument("--dry-run", action="store_true", help="print the space, the trials and the first commands; start nothing")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout; what happens goes to stderr")
    parser.set_defaults(handler=run)


def run(args: argparse.Namespace) -> int:
    """Run, go on with, or show a sweep."""
    from configs.extras import need

    need("optuna", "align sweep", "sweep")
    need("matplotlib", "align sweep", "sweep")
    if args.chain == "show":
        return _show(args)
    from launch.sweep.run import run_sweep
    from launch.sweep.setting import setting_of

    setting = setting_of(_subject(args), _asked(args), args.sweep)
    out = sys.stderr if args.json else sys.stdout
    if args.dry_run:
        return _dry_run(setting, args.json)
    print("\n".join(_head(setting)), file=out, flush=True)
    code = run_sweep(setting, again=shlex.join(["align", *sys.argv[1:]]), retry_failed=args.retry_failed, as_json=args.json)
    _tell(setting.output, args.json)
    return code


def _subject(args: argparse.Namespace) -> Any:
    from launch.chain.asked import machine_overrides
    from launch.sweep.subject import subject_of

    subject = subject_of(args.chain, args.overrides, args.stage)
    if subject.kind == "chain":
        overrides = machine_overrides(args.chain, args.overrides, args.machine, args.processes)
    else:
        overrides = [*args.overrides, *(f"{key}={json.dumps(value)}" for key, value in (("machine", args.machine), ("processes", args.processes)) if value is not None)]
    return subject_of(args.chain, overrides, args.stage)


def _asked(args: argparse.Namespace) -> dict[str, Any]:
    """The keys of a sweep that the command line says."""
    from launch.sweep.space import from_text

    names = ("metric", "stage", "goal", "trials", "jobs", "sampler", "pruner", "seed", "timeout", "keep")
    found = {name: getattr(args, name) for name in names}
    return found | {"space": from_text(args.space) or None, "output": Path(args.output) if args.output else None}


def _head(setting: Setting) -> list[str]:
    """What is about to be done."""
    spec, metric = setting.spec, setting.metric
    total = "every combination" if setting.grid else f"{spec.trials} trials"
    how = {"halving": f"asynchronous successive halving: about the best of {spec.reduction} go on at evaluations 1, {spec.reduction}, {spec.reduction**2} …", "median": "below the median", "none": "none"}
    lines = [f"note: {note}" for note in setting.notes]
    lines += [f"space: {field.key}: {field}" for field in setting.fields]
    lines.append(f"{total}, {spec.jobs} at once, drawn by {spec.sampler}, judged by {metric.name} of {metric.stage} ({metric.goal}); ended early: {how[spec.pruner] if metric.reported else 'none'}")
    lines.append(f"every trial trains {', '.join(sorted(setting.parts.own))}" + (f"; made once for all: {', '.join(sorted(setting.parts.shared))}" if setting.parts.shared else ""))
    return [*lines, f"output: {setting.output}"]


def _dry_run(setting: Setting, as_json: bool) -> int:
    """The space and the first commands; nothing is written."""
    from launch.sweep.setting import overrides_of
    from launch.sweep.study import preview

    draws = [setting.values(labels) for labels in preview(setting.fields, setting.first(), setting.grid, setting.spec, 3)]
    commands = [setting.subject.command([*values, *setting.extra(values)]) for values in draws]
    if as_json:
        facts = {"space": {field.key: str(field) for field in setting.fields}, "trials": setting.spec.trials, "metric": setting.metric.name, "stage": setting.metric.stage, "goal": setting.metric.goal}
        print(json.dumps(facts | {"own": sorted(setting.parts.own), "shared": sorted(setting.parts.shared), "output": str(setting.output), "first": commands, "notes": list(setting.notes)}))
        return 0
    print("\n".join(_head(setting)))
    for number, (values, command) in enumerate(zip(draws, commands, strict=True)):
        print(f"trial {number}: {overrides_of(values)}\n    as: {command}")
    return 0


def _show(args: argparse.Namespace) -> int:
    from configs.errors import UserError

    if len(args.overrides) != 1:
        raise UserError("align sweep show: give the folder of one sweep, such as runs/demo/sweep")
    _tell(Path(args.overrides[0]), args.json)
    return 0


def _tell(output: Path, as_json: bool) -> None:
    """The table, or the JSON, of what is there; and the plots."""
    from launch.sweep import plots, results, study

    found = results.gathered(study.there(output))
    found |= {key: value for key, value in results.written(output).items() if key in ("run", "command", "config")}
    files = plots.draw(study.there(output), found, output / "plots")
    if as_json:
        print(json.dumps(found | {"plots": [str(file) for file in files]}))
    else:
        results.show(found, output)
