"""`align sft|reward|dpo|ppo`: runs one stage from its config file, in one process or many."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.allowed import add_option, with_allowed
from configs.errors import UserError
from launch import compare_cli, continuing, find_lr_cli
from launch.nodes import Nodes, add_options

if TYPE_CHECKING:
    from stages.claim import Claim

STAGES = {
    "sft": "fine-tune a model on demonstrations",
    "reward": "train a reward model on preference pairs",
    "dpo": "optimise a policy on preference pairs directly",
    "ppo": "optimise a policy against a scorer with PPO",
}


def add_parser(verbs: argparse._SubParsersAction) -> None:
    """Add one verb per stage."""
    for stage, line in STAGES.items():
        parser = verbs.add_parser(
            stage,
            help=line,
            description=f"{line[0].upper()}{line[1:]}. The result is published in the registry as {stage}/NAME.",
            epilog=f"Keys, units and defaults: align config explain {stage}",
        )
        parser.add_argument("--config", required=stage != "sft", metavar="FILE", help="the stage's YAML file")
        if stage == "sft":
            continuing.add_options(parser)
            compare_cli.add_option(parser)
        parser.add_argument("overrides", nargs="*", metavar="key=value", help="replaces a key of the file, such as train.epochs=2")
        add_options(parser)
        add_option(parser)
        parser.add_argument("--dry-run", "--print-command", action="store_true", help="check the config, print the command, start nothing")
        parser.add_argument("--json", action="store_true", help="print one JSON object on stdout; logs go to stderr")
        parser.set_defaults(handler=run_stage, stage=stage)
        if stage == "sft":
            find_lr_cli.add_options(parser)


def resolve(stage: str, config: str, overrides: list[str], machine: str | None, processes: int | None) -> Any:
    """The stage's checked config with its output folder filled in. Raises UserError with every problem at once."""
    from configs.load import load

    overrides = list(overrides)
    overrides += [f"machine={machine}"] if machine else []
    overrides += [f"processes={processes}"] if processes is not None else []
    cfg = load(Path(config), stage, overrides)
    output = cfg.output or Path("runs") / f"{stage}-{cfg.name}"
    return cfg.model_copy(update={"output": output})


def run_stage(args: argparse.Namespace) -> int:
    """Check the config, save it resolved in the output folder, run the stage, pass its exit code on."""
    from configs.load import save
    from configs.presets import described
    from launch.batches import check_batches
    from launch.command import check_startable, load_machine, stage_command
    from launch.nodes import nodes_of
    from stages.claim import Claim

    stage = args.stage
    if compare_cli.is_asked(args):
        return compare_cli.run(args)
    find_lr = find_lr_cli.is_asked(args)
    asked = continuing.resolve(args) if continuing.is_asked(args) else resolve(stage, args.config, args.overrides, args.machine, args.processes)
    cfg = with_allowed(asked, args.allow_changed)
    if find_lr:
        return find_lr_cli.run(args, cfg)
    machine = load_machine(cfg.machine, cfg.processes, args.nodes or 1)
    nodes = nodes_of(args, machine.settings, machine.ships)
    config_file = cfg.output / ("plan.yaml" if args.dry_run else "config.yaml")  # a dry run leaves a real run's config alone
    command = stage_command(f"stages.{stage}", config_file, machine, cfg.processes, nodes)
    check_batches({stage: cfg}, command.processes, prefixed=False)
    record = {"stage": stage, "name": cfg.name, "output": str(cfg.output), "config": str(config_file), "command": command.typed}
    if not args.dry_run:
        check_startable(machine, command.processes // nodes.count)
    if args.dry_run:
        save(cfg, config_file)
        changes = described(cfg)
        print(json.dumps(record | ({"preset": changes} if changes else {})) if args.json else "\n".join([*changes, command.typed]))
        return 0
    if nodes.rank:
        return _start(command, record, cfg, args.json, nodes)
    with Claim(cfg.output, f"align {stage}", here_only=True) as claim:
        save(cfg, config_file)
        return _start(command, record, cfg, args.json, nodes, claim)


def _start(command: Any, record: dict[str, Any], cfg: Any, as_json: bool, nodes: Nodes, claim: Claim | None = None) -> int:
    from configs.exit_codes import REQUEUE
    from launch.process import leaving_when_told, run_child

    print(command.typed, file=sys.stderr if as_json else sys.stdout, flush=True)
    stage = record["stage"]
    log_file = cfg.output / "logs" / (f"{stage}.node{nodes.rank}.log" if nodes.rank else f"{stage}.log")
    before = _newest(cfg, stage)
    if nodes.count > 1:
        _meet(nodes, command, record, cfg)
    env = command.environment(**({"ALIGN_RENDEZVOUS_TIMEOUT": str(nodes.timeout)} if nodes.count > 1 else {}), **(claim.handed_on if claim else {}))
    with leaving_when_told():
        outcome = run_child(command.argv, env, log_file, prefix=stage, to_stderr=as_json, on_start=claim.record_child if claim else None)
    after = _newest(cfg, stage) if outcome.code == 0 or outcome.died else None
    published = after if after != before else None
    code = outcome.code
    if published and outcome.died and not outcome.interrupted:
        print(died_after_publishing(stage, published, log_file), file=sys.stderr)
        code = 0
    if nodes.count > 1 and code not in (0, 2, REQUEUE) and not outcome.interrupted:
        print(f"error: {stage} ended with exit code {code} on node {nodes.rank} of {nodes.count}; its log: {log_file}; another node may have failed first, see the logs beside it", file=sys.stderr)
    if as_json:
        print(json.dumps({**record, "log": str(log_file), "exit_code": code, "seconds": round(outcome.seconds, 1), "checkpoint": published}))
    elif published:
        print(f"published {published} in {cfg.registry}; log: {log_file}")
    return code


def died_after_publishing(stage: str, published: str, log: Path) -> str:
    """What to say of a stage whose processes did not end by themselves. Publishing is the last thing that a stage does: its work is whole."""
    return f"warning: {stage} published {published}; then, as it ended, a signal ended a process of it. Nothing is lost (its log: {log})"


def _meet(nodes: Nodes, command: Any, record: dict[str, Any], cfg: Any) -> None:
    """Wait for the other nodes; after that, the config that node 0 has written must be there on this node too.

    Raises:
        UserError: a node that is missing, unreachable or about to start something else; a working folder that the nodes do not share.
    """
    from configs.load import dump
    from launch.meeting import meet, versions
    from stages.nodes.agree import appears

    about = {"stage": record["stage"], "processes": command.processes, "config": cfg.model_dump(mode="json"), "versions": versions()}
    meet(nodes, about)
    if nodes.rank and not appears(Path(record["config"]), dump(cfg)):
        raise UserError(
            f"node {nodes.rank} does not see the {record['config']} that node 0 has written; output must be a folder that all nodes share, under the same path"
        )


def _newest(cfg: Any, stage: str) -> str | None:
    """Reference of the newest checkpoint that this config publishes to, if there is one."""
    from stages.registry import Registry

    if not (cfg.registry / "registry.json").is_file():
        return None
    found = Registry(cfg.registry, create=False).list(stage=stage, name=cfg.name)
    return max(found, key=lambda checkpoint: checkpoint.version).ref if found else None
