"""`align config explain|schema|check|show`: what keys mean, and what a config file comes to."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from configs.errors import UserError

KINDS = ("sft", "reward", "dpo", "ppo", "eval", "chain", "sweep")
STAGES = KINDS[:4]
TELLING_KEYS = {
    "dpo": {"beta", "loss_type", "label_smoothing"},
    "reward": {"center_coefficient", "use_margin", "demonstrations"},
    "sft": {"loss_on", "packing"},
}
"""Keys that only one of the stages trained by TRL has."""


def add_parser(verbs: argparse._SubParsersAction) -> None:
    """Add the verb `config`."""
    parser = verbs.add_parser("config", help="explain configuration keys and print their schema")
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    action = actions.add_parser("explain", help="type, unit, default and meaning of a key; a kind lists its keys")
    action.add_argument("key", metavar="KEY", help=f"such as kl_coef, train.batch_size, ppo.kl_coef; or {', '.join(KINDS)}")
    action.set_defaults(handler=_explain)

    action = actions.add_parser("schema", help="the JSON schema of a kind of config, for editors")
    action.add_argument("kind", nargs="?", choices=KINDS, default="chain", metavar="KIND", help=f"{', '.join(KINDS)} (default: chain)")
    action.set_defaults(handler=_schema)

    for name, line, handler in (
        ("check", "check a config file: every problem with its line", _check),
        ("show", "the config with every default written out, as a stage sees it", _show),
    ):
        action = actions.add_parser(name, help=line)
        action.add_argument("file", metavar="FILE")
        action.add_argument("overrides", nargs="*", metavar="key=value", help="wins over the file, such as train.learning_rate=1e-4")
        action.add_argument("--kind", choices=KINDS, help="the kind of config (default: told by its keys)")
        action.add_argument("--json", action="store_true", help="for machines")
        action.set_defaults(handler=handler)


def _explain(args: argparse.Namespace) -> int:
    from configs.explain import explain

    print(explain(args.key))
    return 0


def _schema(args: argparse.Namespace) -> int:
    from configs.explain import json_schema

    print(json.dumps(json_schema(args.kind), indent=2))
    return 0


def _check(args: argparse.Namespace) -> int:
    from configs.load import load

    kind = args.kind or guess_kind(args.file)
    try:
        load(args.file, kind, args.overrides)
    except UserError as error:
        if not args.json:
            raise
        print(json.dumps({"file": args.file, "kind": kind, "good": False, "problems": str(error).splitlines()}))
        return 2
    print(json.dumps({"file": args.file, "kind": kind, "good": True, "problems": []}) if args.json else f"{args.file}: a good {kind} config")
    return 0


def _show(args: argparse.Namespace) -> int:
    from configs.load import dump, load
    from configs.presets import described

    config = load(args.file, args.kind or guess_kind(args.file), args.overrides)
    if not args.json:
        for line in described(config):
            print(f"# {line}")
    print(json.dumps(config.model_dump(mode="json", by_alias=True)) if args.json else dump(config), end="\n" if args.json else "")
    return 0


def guess_kind(file: str) -> str:
    """The kind of a config file, told by the keys that only one kind has, else by its name. UserError where neither tells."""
    from configs.yaml_lines import parse, read_text

    data: Any = parse(read_text(file), file).data
    found = set(data) if isinstance(data, dict) else set()
    if "base" in found or found & set(STAGES):
        return "chain"
    if "checkpoints" in found or "against" in found:
        return "eval"
    if "space" in found or "trials" in found:
        return "sweep"
    if "prompts" in found:
        return "ppo"
    for kind, keys in TELLING_KEYS.items():
        if found & keys:
            return kind
    words = Path(file).stem.replace("-", "_").replace(".", "_").split("_")
    named = [kind for kind in KINDS if kind in words]
    if len(named) == 1:
        return named[0]
    raise UserError(f"{file}: its keys do not tell what kind of config this is; say so with --kind ({', '.join(KINDS)})")
