"""`align sft --find-lr`: which learning rate to start with, from a test of about a hundred optimizer steps; publishes nothing."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from typing import Any

from configs.errors import UserError

FOLDER, RESULT, PLOT = "find-lr", "learning_rate.json", "learning_rate.png"
RANGE = "1e-6:1:100"
SHOWN = 12  # rows of the table


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of `align sft`."""
    parser.add_argument("--find-lr", action="store_true", help="test learning rates and suggest one; trains a copy for about 100 steps and publishes nothing")
    parser.add_argument("--lr-range", metavar="MIN:MAX:STEPS", help=f"learning rates that --find-lr goes through, and its optimizer steps (default {RANGE})")


def is_asked(args: argparse.Namespace) -> bool:
    """Whether to test learning rates. Raises UserError for the range of a test that is not asked for."""
    if getattr(args, "lr_range", None) and not args.find_lr:
        raise UserError(f"--lr-range {args.lr_range}: goes with --find-lr; a run's own rate is train.learning_rate=RATE")
    return bool(getattr(args, "find_lr", False))


def parse_range(text: str) -> tuple[float, float, int]:
    """MIN:MAX:STEPS. Raises UserError for anything else."""
    try:
        lowest, highest, steps = text.split(":")
        found = float(lowest), float(highest), int(steps)
    except ValueError:
        raise UserError(f"--lr-range {text}: expected MIN:MAX:STEPS, such as {RANGE}") from None
    if not 0 < found[0] < found[1] < float("inf") or found[2] < 10:
        raise UserError(f"--lr-range {text}: expected 0 < MIN < MAX and at least 10 steps, such as {RANGE}")
    return found


def config_of(cfg: Any, highest: float, steps: int) -> Any:
    """The stage's config as the test runs it: same model, data, batch and optimizer; constant rate, no evaluation, guard or health check."""
    from configs.schema.validation import Validation

    train = cfg.train.model_copy(update={
        "max_steps": steps, "learning_rate": highest, "schedule": "constant", "warmup": 0.0, "log_every": 1, "eval_every": None, "save_every": None,
        "early_stopping_patience": None,
    })  # fmt: skip
    return cfg.model_copy(update={
        "train": train, "output": cfg.output / FOLDER, "keep_resume": False, "guard": cfg.guard.model_copy(update={"enabled": False}),
        "health": cfg.health.model_copy(update={"action": "off"}), "evaluation": Validation(test=False),
    })  # fmt: skip


def run(args: argparse.Namespace, stage: Any) -> int:
    """Run the test on the stage's config in processes of its own, show what it found, pass the exit code on."""
    from configs.load import save
    from launch.batches import check_batches
    from launch.command import check_startable, load_machine, stage_command
    from launch.find_lr import show
    from launch.process import leaving_when_told, run_child
    from stages.claim import Claim

    if (args.nodes or 1) > 1:
        raise UserError("--find-lr runs on one node: what it suggests holds for the same train.batch_size on any number of them; leave out --nodes")
    lowest, highest, steps = parse_range(args.lr_range or RANGE)
    cfg = config_of(stage, highest, steps)
    machine = load_machine(cfg.machine, cfg.processes)
    config_file = cfg.output / "config.yaml"
    command = stage_command("launch.find_lr", config_file, machine, cfg.processes)
    more = ("--from-rate", str(lowest))
    command = replace(command, argv=(*command.argv, *more), typed=" ".join((command.typed, *more)))
    check_batches({"sft": cfg}, command.processes, prefixed=False)
    if args.dry_run:
        save(cfg, config_file)
        print(json.dumps({"command": command.typed}) if args.json else command.typed)
        return 0
    check_startable(machine, command.processes)
    with Claim(cfg.output, "align sft --find-lr", here_only=True) as claim:
        save(cfg, config_file)
        (cfg.output / RESULT).unlink(missing_ok=True)
        print(command.typed, file=sys.stderr if args.json else sys.stdout, flush=True)
        with leaving_when_told():
            done = run_child(command.argv, command.environment(**claim.handed_on), cfg.output / "logs" / "find-lr.log", prefix="find-lr", to_stderr=args.json, on_start=claim.record_child)
    if done.code:
        return done.code
    found = json.loads((cfg.output / RESULT).read_text(encoding="utf-8"))
    plot = show.plot(found, cfg.output / PLOT)
    if args.json:
        print(json.dumps({**found, "result": str(cfg.output / RESULT), "plot": str(plot) if plot else None}))
    else:
        show.table(found, SHOWN)
        print(f"{cfg.output / RESULT}" + (f", {plot}" if plot else "; a plot needs matplotlib: pip install 'align-stack[sweep]'"))
        print(f"suggestion: train.learning_rate={found['suggestion']:.1e} (a tenth of the rate at the lowest smoothed loss, {found['at_lowest']:.1e})")
    return 0
