"""`align config explain|schema|check|show`: what keys mean, and what a config file comes to."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from configs.errors import UserError

KINDS = ("sft", "reward", "dpo", "ppo", "eval", "chain", "sweep")
STAGES = KINDS[:4]
TRAINED_BY_TRL = STAGES[:3]  # their configs are alike but for a few keys
HOW = "name the kind with --kind, or in the file's name, such as my-sft.yaml"


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
    kinds = [args.kind] if args.kind else likely_kinds(args.file)
    found = {kind: _problems(args.file, kind, args.overrides) for kind in kinds}
    good = [kind for kind in kinds if not found[kind]]
    kind = good[0] if good else min(kinds, key=lambda kind: len(found[kind]))
    if args.json:
        print(json.dumps({"file": args.file, "kind": kind, "kinds": good or [kind], "good": bool(good), "problems": found[kind]}))
        return 0 if good else 2
    if not good:
        taken = "" if args.kind else f"\n{args.file}: taken for a {kind} config; if it is another, {HOW}"
        raise UserError("\n".join(found[kind]) + taken)
    print(f"{args.file}: a good {kind} config" if len(good) == 1 else f"{args.file}: good as {', '.join(good)}; its keys fit each of them: {HOW}")
    return 0


def _problems(file: str, kind: str, overrides: list[str]) -> list[str]:
    """What is wrong with a file as a config of this kind, a line each."""
    from configs.load import load

    try:
        load(file, kind, overrides)
    except UserError as error:
        return str(error).splitlines()
    return []


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
    kinds = likely_kinds(file)
    if len(kinds) > 1:
        raise UserError(f"{file}: its keys do not tell what kind of config this is ({', '.join(kinds)}); {HOW}")
    return kinds[0]


def likely_kinds(file: str) -> list[str]:
    """The kinds of config that a file may be of: one where the keys that only one kind has, or its name, tell. UserError for a file that can't be read."""
    from configs.load import MODELS
    from configs.yaml_lines import parse, read_text

    data: Any = parse(read_text(file), file).data
    found = set(data) if isinstance(data, dict) else set()
    if "base" in found or found & set(STAGES):
        return ["chain"]
    for kind, telling in (("eval", {"checkpoints", "against"}), ("sweep", {"space", "trials"}), ("ppo", {"prompts"})):
        if found & telling:
            return [kind]
    keys = {kind: set(MODELS[kind].model_fields) for kind in TRAINED_BY_TRL}
    own = [kind for kind in TRAINED_BY_TRL if found & (keys[kind] - set().union(*(keys[other] for other in TRAINED_BY_TRL if other != kind)))]
    if len(own) == 1:
        return own
    words = Path(file).stem.replace("-", "_").replace(".", "_").split("_")
    named = [kind for kind in KINDS if kind in words]
    return named if len(named) == 1 else list(TRAINED_BY_TRL)
