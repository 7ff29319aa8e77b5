"""`align launch show`: the machine files that ship, and which one a config would get, with the command."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from configs.errors import UserError

STAGES = ("sft", "reward", "dpo", "ppo")
EXAMPLE = "STAGE.yaml"


def add_parser(verbs: argparse._SubParsersAction) -> None:
    """Add the verb `launch`."""
    from launch.nodes import add_options

    parser = verbs.add_parser("launch", help="show machine files and the accelerate launch command a config gets")
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    show = actions.add_parser(
        "show",
        help="which machine file a config gets and why, the command, and every machine file that ships",
        epilog="Starts nothing and writes nothing. Without CONFIG or STAGE, lists every machine file. Machine files lie in configs/accelerate and work with accelerate launch --config_file as they are.",
    )
    show.add_argument("config", nargs="?", metavar="CONFIG|STAGE", help="a stage's or a chain's YAML file, or sft, reward, dpo, ppo for any config")
    show.add_argument("overrides", nargs="*", metavar="key=value", help="replaces a key of the file")
    add_options(show)
    show.add_argument("--json", action="store_true", help="print one JSON object")
    show.set_defaults(handler=show_machines)


def show_machines(args: argparse.Namespace) -> int:
    """Print what each stage of a config would be started with, then every machine file."""
    from configs.machines import FOLDER, machine_names, purpose

    if args.config and "=" in args.config:
        raise UserError(f"{args.config}: expected a config file or a stage before key=value")
    chosen = [chosen_for(stage, cfg, file, args) for stage, cfg, file in stages_of(args)]
    files = {name: purpose(FOLDER / f"{name}.yaml") for name in machine_names()}
    if args.json:
        machines = [{"name": name, "file": str(FOLDER / f"{name}.yaml"), "what": what, "when": when} for name, (what, when) in files.items()]
        print(json.dumps({"chosen": chosen, "machines": machines}, indent=1))
        return 0
    for row in chosen:
        print(f"{row['stage']}: {row['machine']} ({row['file']})")
        print("".join(f"  - {line}\n" for line in row["why"]) + f"  {row['command']}\n")
    if args.config is not None:  # the answer, not buried under all that could have been
        print("all machine files: align launch show")
        return 0
    width = max(map(len, files))
    print("machine files (for several nodes: NAME_nodes, which --nodes takes by itself):")
    for name, (what, when) in files.items():
        print(f"  {name:<{width}}  {what}" + ("" if name.endswith("_nodes") else f"\n  {'':<{width}}  {when}"))
    return 0


def stages_of(args: argparse.Namespace) -> list[tuple[str, Any, str]]:
    """(stage or step, its config, its file) of each stage to show; of a bare stage name, or of nothing, a config that says nothing."""
    from configs.load import load, load_text
    from launch.config_cli import guess_kind

    asked = {key: value for key, value in (("machine", args.machine), ("processes", args.processes)) if value is not None}
    if args.config is None or args.config in STAGES:
        if args.overrides:
            raise UserError(f"{args.overrides[0]}: key=value needs the config file that it changes: align launch show FILE {args.overrides[0]}")
        stage = args.config or "sft"
        rows = {"prompts": ["prompts.jsonl"], "scorers": [{"kind": "length", "target": 10}]} if stage == "ppo" else {"data": "rows.jsonl"}
        return [(stage, load_text(json.dumps({"name": "any", "init_from": "MODEL"} | rows | asked), stage), EXAMPLE)]
    overrides = [*args.overrides, *(f"{key}={value}" for key, value in asked.items())]
    kind = guess_kind(args.config)
    if kind == "chain":
        from launch.chain.asked import machine_overrides
        from launch.chain.steps import sections

        cfg = load(Path(args.config), kind, machine_overrides(args.config, args.overrides, args.machine, args.processes))
        return [(name, section, f"{section.output}/config.yaml") for name, section in sections(cfg).items()]
    cfg = load(Path(args.config), kind, overrides)
    if kind not in STAGES:
        raise UserError(f"{args.config}: a config of {kind}, which runs in one process without a machine file; give a stage's or a chain's config")
    return [(kind, cfg, args.config)]


def typed(name: str, args: argparse.Namespace) -> set[str]:
    """Which of machine and processes the command line says for a stage or step: by an option, or as key=value."""
    from launch.chain.steps import stage_of

    said = {word.partition("=")[0] for word in args.overrides}
    return {key for key in ("machine", "processes") if getattr(args, key) is not None or said & {key, f"{stage_of(name)}.{key}"}}


def chosen_for(name: str, cfg: Any, file: str, args: argparse.Namespace) -> dict[str, Any]:
    """Machine file, command and reasons of one stage, or of a chain's step such as reward-2."""
    from launch.chain.steps import stage_of
    from launch.command import load_machine, stage_command
    from launch.machine_choice import reasons
    from launch.nodes import nodes_of

    machine = load_machine(cfg.machine, cfg.processes, args.nodes or 1)
    if args.nodes and args.nodes > 1:  # to look, neither rank nor address is needed
        args.node_rank = 0 if args.node_rank is None else args.node_rank
        args.main_address = args.main_address or "MAIN_ADDRESS"
    nodes = nodes_of(args, machine.settings, machine.ships)
    stage, chosen = stage_of(name), machine.path.stem
    command = stage_command(f"stages.{stage}", Path(file), machine, cfg.processes, nodes)
    return {
        "stage": name, "machine": chosen, "file": str(machine.path), "nodes": nodes.count, "processes": command.processes,
        "why": reasons(stage, cfg, machine, command.processes, nodes.count, typed(name, args)), "command": command.typed,
    }  # fmt: skip
