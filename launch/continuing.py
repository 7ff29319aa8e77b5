"""`align sft --continue NAME --data NEW`: the config of a run that trains on from a checkpoint, made of its parent's."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.errors import UserError

if TYPE_CHECKING:
    from stages.registry import Checkpoint, Registry

PROMPTS = ("prompt_tuning", "prefix_tuning", "p_tuning")  # methods that train a soft prompt
TECHNIQUE = ("lora", "tune")  # sections that say what is trained
HOW_TRAINED = ("learning_rate_ratio", "quantization")  # of an adapter, whatever it is
FRESH = ("allow_changed", "output", "continued", "init_from", "data", "name", "registry")  # of the parent's config, not taken over


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `align sft` that go with --continue."""
    group = parser.add_argument_group(
        "train on", "align sft --continue NAME --data NEW: the config is that of the checkpoint, with the new data; keys of --config FILE and key=value win over it. "
        "What got better and worse is measured on old and new held-out rows, kept in the manifest, and shown by align registry show")
    group.add_argument("--continue", dest="continued", metavar="NAME", help="an SFT checkpoint to train on from, such as sft/demo or sft/demo@3")
    group.add_argument("--data", action="append", metavar="FILE", help="new demonstrations; can be repeated")
    group.add_argument("--as", dest="new_name", metavar="NAME", help="publish as sft/NAME (default: a new version of the same name)")
    group.add_argument("--merge", action="store_true", help="merge an adapter into its base first, and train a new one (default: train the same adapter on)")
    group.add_argument("--plain-text", metavar="FILE", help="a text file whose perplexity is measured before and after")
    group.add_argument("--rehearse", type=float, metavar="SHARE", help="mix the old training data in, this share of every step's rows, such as 0.2 (train.rehearsal; its weight is 0.3 unless train.rehearsal.weight says otherwise)")
    group.add_argument("--registry", metavar="DIR", help="where NAME is (default: the registry of --config FILE, or runs/registry)")


def is_asked(args: argparse.Namespace) -> bool:
    """Whether to train on from a checkpoint.

    Raises:
        UserError: options that go with it, without it; neither it nor a config.
    """
    if getattr(args, "continued", None):
        return True
    alone = [option for option, value in (
        ("--data", getattr(args, "data", None)), ("--as", getattr(args, "new_name", None)), ("--merge", getattr(args, "merge", False)),
        ("--plain-text", getattr(args, "plain_text", None)), ("--rehearse", getattr(args, "rehearse", None)), ("--registry", getattr(args, "registry", None)),
    ) if value]  # fmt: skip
    if alone:
        raise UserError(f"{', '.join(alone)}: goes with --continue NAME; in a run of its own the config says this (data=…, name=…, registry=…)")
    if not args.config:
        raise UserError(f"align {args.stage} needs --config FILE" + (", or --continue NAME --data NEW" if args.stage == "sft" else ""))
    return False


def resolve(args: argparse.Namespace) -> Any:
    """The checked config of a run that trains on from args.continued, with its output folder filled in.

    An interrupted run of the same command goes on from the version that it began with, whatever was published since.

    Raises:
        UserError: no such checkpoint, one of another stage, one without a config, no data, or whatever the config's own check finds.
    """
    from stages.registry import Registry

    given, lines = _file(args.config)
    overrides = _overrides(args)
    place = Path(args.registry or _overridden(overrides, "registry") or given.get("registry") or "runs/registry")
    if args.continued.partition("/")[0] in ("reward", "dpo", "ppo"):
        raise UserError(f"--continue {args.continued}: expected an SFT checkpoint, such as sft/demo. To fine-tune a policy of another stage, write a config with init_from: {args.continued}")
    registry = Registry(place, create=False)
    output = _output(args, overrides, given)
    parent = registry.resolve(_begun_with(output, registry) or args.continued, stage="sft")
    inherited = _config_of(parent, given, args.continued)
    if _names_another(inherited, given, overrides):  # `tune` and `lora` say the same thing in two ways
        inherited = {key: value for key, value in inherited.items() if key not in TECHNIQUE}
    data = _merged(inherited, given)
    data |= {"init_from": parent.ref, "registry": str(place), "output": str(output), "name": args.new_name or given.get("name") or parent.name}
    data["data"] = args.data or given.get("data")
    if not data["data"] and _overridden(overrides, "data") is None:
        raise UserError("--continue needs the new data: --data FILE, or `data:` in --config FILE")
    data["continued"] = {"old": _old(parent), "plain_text": args.plain_text, "adapter": "merged" if args.merge else "same"} | (given.get("continued") or {})
    if args.rehearse is not None:
        asked = (given.get("train") or {}).get("rehearsal") or {}
        data["train"] = {**(data.get("train") or {}), "rehearsal": {**asked, **_rehearsal(args, data["continued"]["old"])}}
    cfg = _checked(data, overrides, args, lines)
    cfg = cfg.model_copy(update={"continued": _as_asked(cfg, parent, args)})
    return _as_published(cfg, parent) if cfg.continued.adapter == "same" else cfg


def _file(config: str | None) -> tuple[dict[str, Any], dict[Any, int]]:
    """The keys of --config, and the lines they stand at."""
    from configs.yaml_lines import parse, read_text

    if config is None:
        return {}, {}
    document = parse(read_text(Path(config)), config)
    if document.problems or not isinstance(document.data, dict):
        raise UserError("\n".join(f"{config}:{line}: {message}" for line, message in document.problems) or f"{config}:1: expected keys such as `train:`")
    return document.data, document.lines


def _overrides(args: argparse.Namespace) -> list[str]:
    words = list(args.overrides)
    words += [f"machine={args.machine}"] if args.machine else []
    return words + ([f"processes={args.processes}"] if args.processes is not None else [])


def _overridden(overrides: list[str], key: str) -> str | None:
    return next((text for name, _, text in (word.partition("=") for word in reversed(overrides)) if name.strip() == key), None)


def _output(args: argparse.Namespace, overrides: list[str], given: dict[str, Any]) -> Path:
    """The working folder: the one that is asked for, or one that the same command finds again, and no other one shares."""
    from blake3 import blake3

    if asked := _overridden(overrides, "output") or given.get("output"):
        return Path(asked)
    said = json.dumps([args.continued, args.data, args.new_name, args.merge, args.plain_text, args.config, args.rehearse, args.registry, sorted(args.overrides)], sort_keys=True)
    name = args.new_name or args.continued.partition("/")[2].partition("@")[0] or "checkpoint"
    return Path("runs") / f"sft-{name}-continued-{blake3(said.encode()).hexdigest()[:8]}"


def _begun_with(output: Path, registry: Registry) -> str | None:
    """The parent of an unfinished run in this folder; None where there is none. A name may mean a newer version by now."""
    from configs.load import load
    from stages.training.save_names import saves

    config = output / "config.yaml"
    if not config.is_file() or not saves(output / "resume"):
        return None
    asked = str(load(config, "sft").init_from)
    print(f"continue: {output} holds an unfinished run, which began with {asked}; it goes on", file=sys.stderr)
    return asked if registry.resolve(asked) else None


def _config_of(parent: Checkpoint, given: dict[str, Any], asked: str) -> dict[str, Any]:
    """What of the parent's config holds for its child, without functions to import. Raises UserError where it has none and no file stands in."""
    from configs.overrides import escape_references

    found = parent.info("config")
    if not found and not given:
        made = "a combination of adapters" if (parent.info("stage_info") or {}).get("combined") else "a model from outside"
        raise UserError(f"--continue {asked}: {parent.ref} is {made} and has no training config to go on with; give one: --config FILE")
    taken: dict[str, Any] = escape_references({key: value for key, value in (found or {}).items() if key not in FRESH})
    if "metrics" not in (given.get("evaluation") or {}) and (functions := _own_metrics(taken)):
        print(f"continue: {parent.ref} was measured by {', '.join(functions)}; a checkpoint names no code to run here: give `evaluation:` in --config FILE to measure so again", file=sys.stderr)
        taken = {key: value for key, value in taken.items() if key != "evaluation"}
    return taken


def _own_metrics(config: dict[str, Any]) -> list[str]:
    """The functions that a config's evaluation would import."""
    metrics = (config.get("evaluation") or {}).get("metrics") or []
    return [str(metric.get("function")) for metric in metrics if isinstance(metric, dict)]


def _names_another(inherited: dict[str, Any], given: dict[str, Any], overrides: list[str]) -> bool:
    """Whether a technique is asked for in another section than the parent's."""
    asked = {word.partition("=")[0].strip().split(".")[0] for word in overrides} | given.keys()
    named, used = asked & set(TECHNIQUE), {key for key in TECHNIQUE if inherited.get(key) is not None}
    return bool(named) and not named & used


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`above` over `below`: sections key by key, everything else as a whole."""
    out = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(out.get(key), dict) and key not in TECHNIQUE
        out[key] = _merged(out[key], value) if both else value
    return out


def _old(parent: Checkpoint) -> list[dict[str, Any]]:
    """What the parent was trained on, and before it its own parents, as far as it was continued."""
    config = parent.info("config") or {}
    earlier = (config.get("continued") or {}).get("old") or []
    if not config.get("data"):
        return list(earlier)
    parts = (parent.info("data") or {}).get("parts") or {}
    return [{"of": parent.ref, "data": config["data"], "validation": parts.get("validation")}, *earlier]


def _rehearsal(args: argparse.Namespace, old: list[dict[str, Any]]) -> dict[str, Any]:
    """`train.rehearsal` of the old data; what was held out of it stays out. Raises UserError where none is known."""
    if not old:
        raise UserError(f"--rehearse: {args.continued} does not record the data that it was trained on; name it: train.rehearsal.data=FILE")
    return {"data": [source for one in old for source in one["data"]], "share": args.rehearse}


def _checked(data: dict[str, Any], overrides: list[str], args: argparse.Namespace, lines: dict[Any, int]) -> Any:
    from configs.load import load_mapping

    return load_mapping(data, "sft", overrides, args.config or f"config of {args.continued}", lines)


def _as_asked(cfg: Any, parent: Checkpoint, args: argparse.Namespace) -> Any:
    """The `continued` section with `adapter` as it follows from the technique that is asked for: another one than the parent's needs the parent merged."""
    is_adapter = (parent.model_dir / "adapter_config.json").is_file()
    changed = [key for key in TECHNIQUE if _differs((parent.info("config") or {}).get(key), cfg.model_dump(mode="json").get(key))]
    if is_adapter and cfg.continued.adapter == "same" and _has_prompt(parent):
        if cfg.technique.method in PROMPTS:
            if (parent.model_dir / "base").is_dir():
                raise UserError(f"--continue: what lies under the soft prompt of {parent.ref} was trained under it, as it was; train that on: tune=lora or tune=full")
            return cfg.continued
        print(f"continue: the soft prompt of {parent.ref} stays in front, frozen; what lies under it is trained on", file=sys.stderr)
        return cfg.continued.model_copy(update={"adapter": "merged"})
    if is_adapter and changed and cfg.continued.adapter == "same" and parent.info("config"):
        print(f"continue: {', '.join(changed)} asks for another technique than that of {parent.ref}, so its adapter is merged into its base first", file=sys.stderr)
        return cfg.continued.model_copy(update={"adapter": "merged"})
    if not is_adapter and args.merge:
        raise UserError(f"--merge: {parent.ref} holds whole weights, no adapter; leave it out")
    return cfg.continued


def _has_prompt(parent: Checkpoint) -> bool:
    return _adapter_config(parent).get("peft_type", "").upper() in map(str.upper, PROMPTS)


def _adapter_config(parent: Checkpoint) -> dict[str, Any]:
    from stages.foreign import ADAPTER, read_json

    return read_json(parent.model_dir / ADAPTER) if (parent.model_dir / ADAPTER).is_file() else {}


def _as_vectors(cfg: Any, parent: Checkpoint) -> Any:
    """The config with a soft prompt as it lies in the parent: P-tuning and projected prefixes publish the vectors that their network made, not the network."""
    if not _has_prompt(parent):
        return cfg
    tune, has_network = cfg.technique, cfg.technique.method == "p_tuning" or getattr(cfg.technique, "prefix_projection", False)
    if not has_network:
        return cfg
    from configs.schema.tuning import PrefixTuning, PromptTuning

    plain = (PromptTuning if tune.method == "p_tuning" else PrefixTuning)(virtual_tokens=tune.virtual_tokens)
    print(
        f"continue: {parent.ref} holds the vectors that a network made ({tune.method}), not the network: they are trained on themselves, as {plain.method}"
        " (which mostly wants a higher learning rate: train.learning_rate)", file=sys.stderr,
    )  # fmt: skip
    return cfg.model_copy(update={"tune": plain})


def _as_published(cfg: Any, parent: Checkpoint) -> Any:
    """The config with the adapter as it lies in the parent: PiSSA and OLoRA publish a plain one of twice the rank, whose start is no draw any more."""
    from configs.schema import lora_of

    lora = lora_of(cfg)
    if cfg.technique.method in PROMPTS:
        return _as_vectors(cfg, parent)
    if lora is None or not lora.changes_base or not (parent.model_dir / "adapter_config.json").is_file():
        return cfg
    plain = lora.model_copy(update={"init": "default", "rank": 2 * lora.rank, "alpha": lora.alpha * (2**0.5 if lora.rslora else 2)})
    return cfg.model_copy(update={"tune" if cfg.tune is not None else "lora": plain})


def _differs(before: Any, now: Any) -> bool:
    """Whether a section asks for another adapter; keys that an older version did not have, or that say how one is trained, do not count."""
    if isinstance(before, dict) and isinstance(now, dict):
        return any(_differs(value, now.get(key)) for key, value in before.items() if key not in HOW_TRAINED)
    return bool(before != now)
