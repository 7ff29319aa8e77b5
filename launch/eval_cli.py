"""`align eval`: measures and compares checkpoints on held-out prompts."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from configs.errors import UserError
from configs.printable import printable

EPILOG = """\
a scorer is one of  length:WORDS  repetition:NGRAM  regex:PATTERN  keyword:A,B  package.module:function
                    or the registry name of a reward model, such as reward/demo@1; several are summed
keys of --config:   align config explain eval
"""


def add_parser(verbs: argparse._SubParsersAction) -> None:
    """Add the verb `eval`."""
    parser = verbs.add_parser(
        "eval",
        help="measure and compare checkpoints on held-out prompts",
        description="Samples completions with each model and reports score, win rate, KL, length, EOS rate and perplexity, with errors. "
        "Results of published checkpoints are kept in the registry.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("models", nargs="*", metavar="MODEL", help="[LABEL=]registry name, Hugging Face folder or model name")
    parser.add_argument("--prompts", action="append", metavar="FILE", help="prompts to complete; may be repeated")
    parser.add_argument("--scorer", action="append", metavar="SPEC", help="what scores a completion (see below); may be repeated")
    parser.add_argument("--against", metavar="MODEL", help="label or name that win rates are counted against (default: the first)")
    parser.add_argument("--reference", metavar="MODEL", help="label or name that KL is measured to (default: that of --against)")
    parser.add_argument("--registry", metavar="DIR", help="the checkpoint registry (default: runs/registry)")
    parser.add_argument("--subset", choices=["test", "validation", "all"], help="which part of the split is used (default: test)")
    parser.add_argument("--samples-per-prompt", type=int, metavar="N", help="completions per prompt (default: 1)")
    parser.add_argument("--max-prompts", type=int, metavar="N", help="use the first N prompts of the subset (default: all)")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="tokens of the longest completion (default: 64)")
    parser.add_argument("--temperature", type=float, metavar="T", help="sampling temperature (default: 1)")
    parser.add_argument("--seed", type=int, metavar="N", help="seed of sampling and of the bootstrap (default: 0)")
    parser.add_argument("--template", metavar="NAME", help="chat template of models that carry none (default: auto)")
    parser.add_argument("--plain-text", metavar="FILE", help="a text file: its perplexity shows what was forgotten")
    parser.add_argument("--config", metavar="FILE", help="an eval config (YAML); what the command line says wins")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any other key, such as split.seed=3; may be repeated")
    parser.add_argument("--output", metavar="DIR", help="folder for results.json and samples.jsonl")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout; progress goes to stderr")
    parser.set_defaults(handler=run)


def run(args: argparse.Namespace) -> int:
    """Evaluate, print a table or JSON. Returns the exit code."""
    cfg = config_of(args)
    from stages.evaluation.evaluate import evaluate

    result = evaluate(cfg, say=lambda line: print(printable(line), file=sys.stderr, flush=True))
    if args.json:
        print(json.dumps(result, ensure_ascii=False))
    else:
        from stages.evaluation.table import show

        show(result)
    return 0


def config_of(args: argparse.Namespace) -> Any:
    """The checked EvalConfig of a command line. Raises UserError with every problem at once."""
    from configs.load import load, load_text

    given = settings(args)
    if args.config:
        overrides = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in given.items()]
        return load(Path(args.config), "eval", [*overrides, *args.set])
    missing = [flag for key, flag in (("checkpoints", "a model"), ("prompts", "--prompts"), ("scorers", "--scorer")) if key not in given]
    if missing:
        raise UserError(f"align eval needs {', '.join(missing)} (or --config FILE); see align eval --help")
    text = "\n".join(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in _nested(given).items())
    if not args.set:
        return load_text(text, "eval", "command line")
    return _with_overrides(text, args.set)


def _with_overrides(text: str, overrides: list[str]) -> Any:
    """A config of the command line alone, with --set applied the way a file's overrides are."""
    import tempfile

    from configs.load import load

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "command-line.yaml"
        file.write_text(text, encoding="utf-8")
        return load(file, "eval", overrides)


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What the flags say, by dotted key of the config."""
    from rewards.build import parse_spec

    given: dict[str, Any] = {}
    if args.models:
        given["checkpoints"] = _checkpoints(args)
    if args.prompts:
        given["prompts"] = args.prompts
    if args.scorer:
        given["scorers"] = [parse_spec(text) for text in args.scorer]
    flags = {
        "against": _label(args.against), "reference": _label(args.reference), "registry": args.registry, "subset": args.subset, "seed": args.seed,
        "samples_per_prompt": args.samples_per_prompt, "max_prompts": args.max_prompts, "sampling.max_new_tokens": args.max_new_tokens,
        "sampling.temperature": args.temperature, "template": args.template, "plain_text": args.plain_text, "output": args.output,
    }  # fmt: skip
    return given | {key: value for key, value in flags.items() if value is not None}


def _checkpoints(args: argparse.Namespace) -> dict[str, str]:
    """Label -> model, of the models named and of those that --against and --reference name beside them."""
    found: dict[str, str] = {}
    for text in args.models:
        label = _label(text)
        if label in found:
            raise UserError(f"two models are called {label!r}; give one another label: LABEL={_model(text)}")
        found[str(label)] = _model(text)
    for text in (args.against, args.reference):
        if text is not None and _label(text) not in found:
            found[str(_label(text))] = _model(text)
    return found


def _label(text: str | None) -> str | None:
    """`sft=sft/demo@1` is called sft; a bare `sft/demo@1` is called by its whole name."""
    return text if text is None else text.partition("=")[0]


def _model(text: str) -> str:
    label, equals, model = text.partition("=")
    return model if equals else label


def _nested(flat: dict[str, Any]) -> dict[str, Any]:
    """{"sampling.temperature": 1} as {"sampling": {"temperature": 1}}."""
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        section, dot, rest = key.partition(".")
        if dot:
            nested.setdefault(section, {})[rest] = value
        else:
            nested[key] = value
    return nested
