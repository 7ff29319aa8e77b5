"""`align registry …`: what was published, whether it is whole, where it came from, and what may go.

Exit codes: 0 fine; 1 `verify` found problems; 2 something the user can mend. Nothing heavy is imported before a command runs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.errors import UserError
from configs.printable import printable
from launch.registry import carry, collect, examine
from launch.registry.output import print_json, size, table

if TYPE_CHECKING:
    from stages.registry import Checkpoint, Registry

FORMS = "sft/demo, sft/demo@3, sft/demo@latest, sft/demo@best:METRIC, sft/demo@ALIAS or an id"


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `registry` and its commands to the parser of `align`."""
    parser = subparsers.add_parser("registry", help="list, verify, name, collect, import and export checkpoints", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands", required=True)

    command = _command(commands, "list", run_list, "list the checkpoints")
    command.add_argument("family", nargs="?", metavar="STAGE[/NAME]", help="only this stage, or only this name")

    command = _command(commands, "show", run_show, "show what is recorded about a checkpoint")
    command.add_argument("ref", metavar="REF", help=FORMS)

    command = _command(commands, "verify", run_verify, "check that a checkpoint is whole (exit code 1 if not)")
    command.add_argument("ref", nargs="?", metavar="REF", help=f"{FORMS}; all checkpoints when left out")
    command.add_argument("--deep", action="store_true", help="read every file and compare its content's hash, not sizes only")

    command = _command(commands, "lineage", run_lineage, "show what a checkpoint was made from, as a tree")
    command.add_argument("ref", metavar="REF", help=FORMS)

    command = _command(commands, "alias", run_alias, "list aliases, show one's history, or point one at a checkpoint")
    command.add_argument("family", metavar="STAGE/NAME", help="whose aliases, such as ppo/demo")
    command.add_argument("alias", nargs="?", metavar="ALIAS", help="such as production; without REF its history is shown")
    command.add_argument("ref", nargs="?", metavar="REF", help="point the alias here (checked deeply first)")
    command.add_argument("--expect", metavar="REF", help="only if it points there now ('' = only if it does not exist yet)")
    command.add_argument("--rollback", action="store_true", help="point it at where it pointed before its newest move; once more for the one before")
    command.add_argument("--history", action="store_true", help="show where it pointed, oldest first (also what ALIAS alone does)")

    _add_collection(commands)
    _add_carrying(commands)


def _add_carrying(commands: Any) -> None:
    command = _command(commands, "import", carry.run_import, "publish a Hugging Face folder or a model of the hub as a checkpoint")
    command.add_argument("source", metavar="FOLDER|ORG/NAME", help="a folder as save_pretrained writes it (whole weights or a LoRA adapter), or a name on the hub")
    command.add_argument("--as", required=True, dest="family", metavar="STAGE/NAME", help="sft, dpo or ppo for a language model, reward for one with a score head")
    command.add_argument("--base", metavar="REF", help="what an adapter was trained on, if its adapter_config.json does not say it")
    command.add_argument("--template", default="auto", metavar="NAME", help="chat template: auto (the tokenizer's own, else plain), plain, chatml, raw, llama3, qwen, zephyr, mistral, gemma or a .jinja file")
    command.add_argument("--revision", metavar="REV", help="branch, tag or commit on the hub")

    command = _command(commands, "export", carry.run_export, "write a checkpoint to a folder: weights, tokenizer, model card, checksums")
    command.add_argument("ref", metavar="REF", help=FORMS)
    command.add_argument("folder", type=Path, metavar="DIR", help="a new or empty folder")
    _export_options(command)

    command = _command(commands, "push", carry.run_push, "show what an upload to the Hugging Face hub would send, or with --yes send it")
    command.add_argument("ref", metavar="REF", help=FORMS)
    command.add_argument("repo", metavar="ORG/NAME", help="the model on the hub; made if it is missing")
    command.add_argument("--yes", action="store_true", help="send it")
    command.add_argument("--public", action="store_true", help="make a missing one public (default: private)")
    _export_options(command)

    command = _command(commands, "doctor", examine.run_doctor, "try what a registry needs on a folder's file system (exit code 1 if it lacks something)")
    command.add_argument("folder", nargs="?", type=Path, metavar="DIR", help="default: the registry's folder")


def _export_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--merge", action="store_true", help="merge an adapter into its base; the largest logit difference on 8 prompts is printed")
    command.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of merged weights (default: float32)")
    command.add_argument("--licence", metavar="ID", help="licence for the model card, such as apache-2.0")
    command.add_argument("--samples", type=Path, metavar="FILE", help="show the first of these in the card: the samples.jsonl of align eval --output")


def _add_collection(commands: Any) -> None:
    command = _command(commands, "gc", collect.run_gc, "show which checkpoints no rule keeps, or with --apply move them to the trash")
    command.add_argument("family", nargs="?", metavar="STAGE[/NAME]", help="only this stage, or only this name (default: all)")
    command.add_argument("--keep", type=int, default=3, metavar="K", help="newest sound checkpoints of each name that stay (default: 3)")
    command.add_argument("--keep-resume", type=int, default=1, metavar="N", help="of the newest N of these the resumable state stays too, if it is there (default: 1)")
    command.add_argument("--best", action="append", default=[], metavar="METRIC", help="the best by this metric stays too; may be repeated")
    command.add_argument("--grace", type=duration, default=timedelta(days=7), metavar="TIME", help="how long the trash is kept: 7d (default), 12h, 30m or 0")
    command.add_argument("--apply", action="store_true", help="do it; without this only the plan is shown")

    command = _command(commands, "restore", collect.run_restore, "bring a checkpoint back from the trash")
    command.add_argument("ref", nargs="?", metavar="ID", help="its id, or STAGE/NAME@VERSION; what the trash holds is listed when left out")

    command = _command(commands, "resume", collect.run_resume, "write the resumable state of a published run to an output folder, to train on from it")
    command.add_argument("ref", metavar="REF", help=FORMS)
    command.add_argument("folder", type=Path, metavar="OUTPUT", help="the `output` of the run that goes on")


def duration(text: str) -> timedelta:
    """7d, 12h, 30m, 45s or 0 as a time span."""
    units = {"d": "days", "h": "hours", "m": "minutes", "s": "seconds"}
    number, unit = (text[:-1], text[-1]) if text[-1:] in units else (text, "")
    try:
        if float(number) >= 0 and (unit or float(number) == 0):
            return timedelta(**{units[unit or "s"]: float(number)})
    except (ValueError, OverflowError):
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is no time; write a number and d, h, m or s, such as 7d or 12h")


def _command(commands: Any, name: str, run: Callable[[argparse.Namespace], int], line: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=line, description=f"{line[0].upper()}{line[1:]}.")
    parser.add_argument("--registry", type=Path, default=Path("runs/registry"), metavar="DIR", help="default: runs/registry")
    parser.add_argument("--json", action="store_true", help="print one JSON value")
    parser.set_defaults(func=run, handler=run)
    return parser


def _open(args: argparse.Namespace) -> Registry:
    from stages.registry import Registry

    return Registry(args.registry, create=False)


def run_list(args: argparse.Namespace) -> int:
    """Table or JSON of the checkpoints; those whose manifest is broken are told on stderr. ADDS: bytes that no checkpoint above it holds too."""
    from stages.registry.sizes import real_sizes

    registry = _open(args)
    stage, _, name = (args.family or "").partition("/")
    damaged = registry.damaged()  # first: what it finds out, the list then knows
    found = registry.list(stage or None, name or None)
    real = real_sizes(found)
    total = {"size": sum(item.size for item in found), "real_size": sum(real.values())}
    names = _aliases(registry, found)
    if args.json:
        rows = [{**_summary(item), "real_size": real[item.id], "aliases": names.get(item.id, [])} for item in found]
        print_json({"checkpoints": rows, "total": total, "damaged": {key: str(item) for key, item in damaged.items()}})
    elif found:
        head = ("REF", "CREATED", "SIZE", "ADDS", "ALIASES", "MADE FROM", "ID")
        body = [
            (item.ref, item.manifest["created"], size(item.size), size(real[item.id]), ", ".join(names.get(item.id, [])), _made_from(item), item.id)
            for item in found
        ]  # fmt: skip
        print("\n".join(table([head, *body])))
        print(f"{len(found)} checkpoint{'s' if len(found) > 1 else ''}: {size(total['size'])}, of which {size(total['real_size'])} on the disk (identical files are stored once)")
    else:
        print(f"no checkpoints{f' of {args.family}' if args.family else ''} in {args.registry}")
    for checkpoint_id, problem in damaged.items():
        print(f"warning: checkpoint {checkpoint_id} is damaged and not listed: {printable(str(problem))}", file=sys.stderr)
    return 0


def run_show(args: argparse.Namespace) -> int:
    """Everything recorded about one checkpoint."""
    registry = _open(args)
    checkpoint = registry.resolve(args.ref)
    aliases = _aliases(registry, [checkpoint]).get(checkpoint.id, [])
    results = registry.evaluations(checkpoint)
    if args.json:
        print_json({**checkpoint.manifest, "path": str(checkpoint.path), "aliases": aliases, "evaluations": results})
        return 0
    facts = checkpoint.manifest
    code = facts["code"]
    sha = f" {code['git'][:12]}{' with uncommitted changes' if code['dirty'] else ''}" if "git" in code else ""
    rows = [
        ("checkpoint", " ".join([checkpoint.ref, *(f"@{alias}" for alias in aliases)])),
        ("id", checkpoint.id),
        ("created", facts["created"]),
        ("model", str(checkpoint.model_dir)),
        ("size", f"{size(checkpoint.size)} in {len(facts['files'])} files"),
        ("made from", _made_from(checkpoint)),
        ("code", f"align-stack {code['version']}{sha}, python {facts['python']}"),
        ("libraries", ", ".join(f"{key} {item}" for key, item in facts["libraries"].items())),
        ("machine", f"{facts['hardware']['platform']}, {facts['hardware']['cpu_count']} processors"),
        *((key, _short(item)) for key, item in facts["info"].items() if key not in ("config", "continued")),
        *((f"evaluation {index}", _short(item)) for index, item in enumerate(results, 1)),
        ("config", _short(facts["info"].get("config", {}))),
    ]
    print("\n".join([*table(rows), *examine.loading(registry, checkpoint)]))
    if continued := facts["info"].get("continued"):
        from stages.continuing.table import lines

        print("\n".join(["", *(printable(line) for line in lines(continued))]))
    return 0


def run_verify(args: argparse.Namespace) -> int:
    """Problems of one checkpoint, or of all; 1 when there are any."""
    registry = _open(args)
    if args.ref is not None:
        asked = {args.ref: args.ref}
    else:
        asked = {**{item.ref: item.id for item in registry.list()}, **{key: key for key in registry.damaged()}}
    problems = {label: registry.verify(ref, args.deep) for label, ref in asked.items()}
    if args.json:
        rows = {label: [vars(problem) for problem in found] for label, found in problems.items()}
        print_json({"deep": args.deep, "sound": not any(problems.values()), "checkpoints": rows})
    else:
        for label, found in problems.items():
            print(f"{label}: {'damaged' if found else 'sound'} ({'contents' if args.deep else 'manifest, files and sizes'} checked)")
            for problem in found:
                print(f"  {printable(str(problem))}")
        if not problems:
            print(f"no checkpoints in {args.registry}")
    return 1 if any(problems.values()) else 0


def run_lineage(args: argparse.Namespace) -> int:
    """The tree of parents."""
    tree = _open(args).lineage(args.ref)
    if args.json:
        print_json(tree.to_json())
    else:
        print(printable(tree.render()))
    return 0


def run_alias(args: argparse.Namespace) -> int:
    """The aliases of a name, the history of one, or a move of one."""
    registry = _open(args)
    if args.rollback:
        _check_rollback(args)
        checkpoint = registry.rollback_alias(args.family, args.alias)
        moved = {"alias": f"{args.family}@{args.alias}", "ref": checkpoint.ref, "id": checkpoint.id}
        print_json(moved) if args.json else print(f"{moved['alias']} points at {checkpoint.ref} ({checkpoint.id}) again")
        return 0
    if args.ref is not None:
        checkpoint = registry.set_alias(args.family, args.alias, args.ref, args.expect)
        moved = {"alias": f"{args.family}@{args.alias}", "ref": checkpoint.ref, "id": checkpoint.id}
        print_json(moved) if args.json else print(f"{moved['alias']} points at {checkpoint.ref} ({checkpoint.id})")
        return 0
    if args.history and args.alias is None:
        raise UserError("--history needs an alias: align registry alias STAGE/NAME ALIAS --history")
    if args.expect is not None:
        raise UserError("--expect goes with a move; name the checkpoint too: align registry alias STAGE/NAME ALIAS REF --expect REF")
    rows: list[tuple[str, ...]]
    head: tuple[str, ...]
    if args.alias is None:
        now = {alias: registry.alias_history(args.family, alias)[-1] for alias in registry.aliases(args.family)}
        rows = [(f"{args.family}@{alias}", entry["ref"], entry["created"], entry["id"]) for alias, entry in now.items()]
        head, nothing, value = ("ALIAS", "POINTS AT", "SINCE", "ID"), f"{args.family} has no aliases in {args.registry}", list(now.values())
    else:
        value = registry.alias_history(args.family, args.alias)
        if not value:
            raise UserError(f"{args.family} has no alias {args.alias!r} in {args.registry}; see: align registry alias {args.family}")
        rows = [
            (str(entry["number"]), entry["ref"], entry["created"], entry["id"], f"rollback of {entry['undoes']}" if "undoes" in entry else "")
            for entry in value
        ]  # fmt: skip
        head, nothing = ("MOVE", "TO", "AT", "ID", ""), ""
    if args.json:
        print_json(value)
    else:
        print("\n".join(table([head, *rows])) if rows else nothing)
    return 0


def _check_rollback(args: argparse.Namespace) -> None:
    if args.alias is None or args.ref is not None or args.expect is not None:
        raise UserError("--rollback takes a name and an alias and nothing else: align registry alias STAGE/NAME ALIAS --rollback")


def _aliases(registry: Registry, checkpoints: Sequence[Checkpoint]) -> dict[str, list[str]]:
    """Checkpoint id -> its aliases. A damaged alias file is told on stderr: it must not hide the checkpoints."""
    found: dict[str, list[str]] = {}
    for family in sorted({f"{item.stage}/{item.name}" for item in checkpoints}):
        try:
            for alias, checkpoint_id in registry.aliases(family).items():
                found.setdefault(checkpoint_id, []).append(alias)
        except UserError as error:
            print(f"warning: {error}", file=sys.stderr)
    return found


def _summary(checkpoint: Checkpoint) -> dict[str, Any]:
    facts = checkpoint.manifest
    kept = {key: facts[key] for key in ("id", "stage", "name", "version", "created", "parents")}
    return {"ref": checkpoint.ref, **kept, "size": checkpoint.size, "path": str(checkpoint.path), "metrics": facts["info"].get("metrics", {})}


def _made_from(checkpoint: Checkpoint) -> str:
    parents = checkpoint.manifest["parents"]
    return ", ".join(dict.fromkeys(parent.get("ref") or parent.get("source") or "?" for parent in parents)) or "-"


def _short(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
