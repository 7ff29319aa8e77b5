"""The model card of an export: README.md with the hub's metadata, from what the manifest and the evaluations record. Pure text.

Absolute paths name a machine and its users: only their last part is shown. Prompts and completions are shown only where a file of samples was given.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePath
from typing import Any

from configs.printable import printable
from stages.registry.lineage import LineageNode
from stages.registry.loading import NOTE, auto_class, is_stacked, outside_arguments, stacked_lines
from stages.registry.manifest import Checkpoint

NO_LICENCE = "to-be-filled-in"
MADE_BY = {"sft": "supervised fine-tuning on demonstrations", "reward": "a Bradley-Terry reward model on preference pairs",
           "dpo": "direct preference optimisation (DPO)", "ppo": "proximal policy optimisation (PPO)"}  # fmt: skip
Z95 = 1.959964  # standard errors on either side of a mean that make 95 %
NO_METRICS = ("n", "prompts", "pairs", "eval_set_detail")  # counts and settings beside the metrics of a result
Estimate = tuple[float, float | None, float | None]  # value, and its 95 % interval where one is known
_PATH = re.compile(r"(?<![\w.:/-])(?:~|/)[^\s\"'`|,;)\]}]*/([^\s/\"'`|,;)\]}]+)")


@dataclass(frozen=True)
class Facts:
    """What a card is written from. weights: whole, adapter or merged. samples: {"prompt", "completion", "score"} rows."""

    checkpoint: Checkpoint
    lineage: LineageNode
    evaluations: Sequence[Mapping[str, Any]]
    weights: str = "whole"
    licence: str | None = None
    samples: Sequence[Mapping[str, Any]] = field(default_factory=tuple)
    difference: float | None = None  # of merged and unmerged logits
    name: str | None = None  # on the hub


def card(facts: Facts) -> str:
    """README.md: metadata between dashes, then sections; those of which nothing is recorded are left out."""
    import yaml

    item = facts.checkpoint
    head = yaml.safe_dump(metadata(facts), sort_keys=False, allow_unicode=True)
    how = MADE_BY.get(item.stage, item.stage) if item.info("source") is None else "imported from outside"
    title = facts.name or f"{item.stage}/{item.name}"
    sections = [
        f"---\n{head}---\n\n# {title}\n\n`{item.ref}` of a registry of align-stack: {how}. Published {item.manifest['created']}, id `{item.id}`, manifest `{item.manifest_hash[:16]}…`.",
        _use(facts), _lineage(facts), _data(item), _metrics(facts), _samples(facts.samples), _section("Configuration", _block("yaml", _config(item))), _versions(item), _licence(facts),
    ]  # fmt: skip
    return "\n\n".join(section for section in sections if section) + "\n"


def metadata(facts: Facts) -> dict[str, Any]:
    """What the hub reads from the first lines of a card."""
    item = facts.checkpoint
    scorer, bases = item.stage == "reward", _bases(facts.lineage)
    found: dict[str, Any] = {"license": facts.licence or "other"}
    if not facts.licence:
        found["license_name"] = NO_LICENCE
    found |= {"library_name": "peft" if facts.weights == "adapter" else "transformers", "pipeline_tag": "text-classification" if scorer else "text-generation"}
    if bases:
        found |= {"base_model": bases[0], "base_model_relation": "adapter" if facts.weights == "adapter" else "finetune"}
    found["tags"] = ["align-stack", item.stage, *(["reward-model"] if scorer else [])]
    results = [_hub_result(result) for result in facts.evaluations]
    if any(entry["metrics"] for entry in results):
        found["model-index"] = [{"name": facts.name or f"{item.stage}-{item.name}", "results": [entry for entry in results if entry["metrics"]]}]
    return found


def _hub_result(result: Mapping[str, Any]) -> dict[str, Any]:
    metrics = [{"type": name, "value": row[0]} for name, row in figures(result).items()]
    return {
        "task": {"type": "text-generation"}, "metrics": metrics,
        "dataset": {"name": f"evaluation set {result['eval_set']}" if result.get("eval_set") else "held-out prompts", "type": "held-out"},
    }  # fmt: skip


def _bases(node: LineageNode) -> list[str]:
    """Names on the hub from which a model descends: only these can be followed from a card."""
    here = [node.label] if node.kind == "external" and re.fullmatch(r"[\w.-]+/[\w.-]+", node.label) else []
    return list(dict.fromkeys([*here, *(name for parent in node.parents for name in _bases(parent))]))


def _use(facts: Facts) -> str:
    item, place = facts.checkpoint, facts.name or "FOLDER"
    cls = auto_class(item)
    if is_stacked(item):
        lines = stacked_lines(item, place, "BASE")
        code = "\n".join(lines)
        note = f"\n\nA soft prompt stands in front of the weights in `base`, which mean little without it. {NOTE}" + (
            " peft reads the score of a row at its last column: give it one row at a time, or pad on the left." if item.stage == "reward" else ""
        )
        if any('"BASE"' in line for line in lines):
            note += f" BASE is `{public(str(item.info('stage_info', {}).get('adapter', {}).get('base')))}`."
    elif facts.weights == "adapter":
        adapter = facts.checkpoint.info("stage_info", {}).get("adapter", {})
        code = f"from peft import PeftModel\nfrom transformers import {cls}\n\nmodel = PeftModel.from_pretrained({cls}.from_pretrained(\"BASE\"{outside_arguments(item)}), \"{place}\")"
        base = f"`{public(str(adapter['base']))}`" if adapter.get("base") else "what `adapter_config.json` names"
        note = f"\n\nBASE is {base}; on other weights this adapter means nothing."
    else:
        code, note = f"from transformers import {cls}, AutoTokenizer\n\nmodel, tokenizer = {cls}.from_pretrained(\"{place}\"), AutoTokenizer.from_pretrained(\"{place}\")", ""
    if facts.weights == "merged":
        difference = "" if facts.difference is None else f"; over 8 prompts the largest difference between merged and unmerged logits is {facts.difference:.3g}"
        note += f"\n\nThe adapter is merged into its base{difference}."
    if facts.checkpoint.stage == "reward":
        info = facts.checkpoint.info("stage_info", {})
        note += "\n\nThe score is read at the last token of prompt and completion."
        if info.get("mean") is not None and info.get("std") is not None:
            note += f" On demonstrations it has mean {_number(info['mean'])} and standard deviation {_number(info['std'])}."
    return _section("Use", _block("python", code) + note)


def _lineage(facts: Facts) -> str:
    return _section("Lineage", _block("text", without_paths(facts.lineage).render()))


def without_paths(node: LineageNode) -> LineageNode:
    """The same tree with the last part of every path."""
    return replace(node, label=public(node.label), note=public(node.note) if node.note else None, parents=tuple(map(without_paths, node.parents)))


def _data(item: Checkpoint) -> str:
    data = told(item.info("data") or {})
    rows = [[part, _number(count)] for part, count in (data.get("rows") or {}).items()] if isinstance(data.get("rows"), Mapping) else []
    lines = [_table(["part", "rows after filtering"], rows)] if rows else []
    if dropped := data.get("dropped"):
        lines.append(f"Left out: {inert(public(_flat(dropped)))}.")
    if split := data.get("split"):
        lines.append(f"Split by prompt: {inert(public(_flat(split)))}.")
    if data.get("fingerprint"):
        lines.append(f"Fingerprint of the rows in their order: `{data['fingerprint']}`.")
    return _section("Training data", "\n\n".join(lines))


def figures(result: Mapping[str, Any]) -> dict[str, Estimate]:
    """Name -> (value, low, high) of one evaluation: 95 % intervals where it has standard errors, says an interval itself, or counts cases."""
    place: Mapping[str, Any] = result["metrics"] if isinstance(result.get("metrics"), Mapping) else result
    found = dict(_estimates(place, ""))
    pairs = place.get("pairs")
    if "accuracy" in found and isinstance(pairs, int) and pairs > 0:
        found["accuracy"] = (found["accuracy"][0], *wilson(found["accuracy"][0], pairs))
    return found


def _estimates(place: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Estimate]]:
    for key, value in place.items():
        if key in NO_METRICS or key.endswith(("_se", "_ci")):
            continue
        if isinstance(value, Mapping):
            if "mean" in value:
                yield f"{prefix}{key}", _around(value["mean"], value.get("se"))
            else:
                yield from _estimates(value, f"{prefix}{key}.")
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            interval = place.get(f"{key}_ci")
            known = isinstance(interval, Sequence) and len(interval) == 2
            yield f"{prefix}{key}", (float(value), float(interval[0]), float(interval[1])) if known and interval else _around(value, place.get(f"{key}_se"))


def _around(value: float, error: Any) -> Estimate:
    return (value, value - Z95 * error, value + Z95 * error) if isinstance(error, (int, float)) else (value, None, None)


def wilson(rate: float, n: int) -> tuple[float, float]:
    """The 95 % interval of a share of n independent cases (Wilson 1927): for 5 of 10, [0.237, 0.763]."""
    centre, half = rate + Z95**2 / (2 * n), Z95 * math.sqrt(rate * (1 - rate) / n + Z95**2 / (4 * n**2))
    return (centre - half) / (1 + Z95**2 / n), (centre + half) / (1 + Z95**2 / n)


def _metrics(facts: Facts) -> str:
    parts = []
    own = facts.checkpoint.info("metrics") or {}
    if found := figures(own):
        parts.append("At the end of training, on held-out rows:\n\n" + _figure_table(found))
    for result in facts.evaluations:
        found = figures(result)
        if found and dict(result.get("metrics") or {}) != dict(own):
            count = result.get("prompts") or (result.get("metrics") or {}).get("prompts")
            against = f", compared with {inert(public(str(result['against'])))}" if result.get("against") else ""
            where = f"evaluation set `{result['eval_set']}`" if result.get("eval_set") else "held-out prompts"
            parts.append(f"On {where}{f', {count} prompts' if count else ''}{against}:\n\n" + _figure_table(found))
    return _section("Metrics", "\n\n".join(parts))


def _figure_table(found: Mapping[str, Estimate]) -> str:
    return _table(["metric", "value", "95 % interval"], [[name, _number(value), f"[{_number(low)}, {_number(high)}]" if low is not None else "–"] for name, (value, low, high) in found.items()])


def _samples(samples: Sequence[Mapping[str, Any]]) -> str:
    parts = []
    for row in samples:
        score = f", score {_number(row['score'])}" if isinstance(row.get("score"), (int, float)) else ""
        shown = (("Prompt", row.get("prompt")), (f"Completion{score}", row.get("completion")))
        parts.append("\n\n".join(f"{title}:\n\n{_block('text', str(text)) if text else '(empty)'}" for title, text in shown if text is not None))
    return _section("Samples", "\n\n".join(parts))


def _config(item: Checkpoint) -> str:
    import yaml

    config = told(item.info("config") or {})
    return yaml.safe_dump(_public_values(config), sort_keys=True, allow_unicode=True).strip() if config else ""


def _versions(item: Checkpoint) -> str:
    code, libraries = item.manifest["code"], item.manifest["libraries"]
    sha = f" {code['git'][:12]}{' with uncommitted changes' if code.get('dirty') else ''}" if "git" in code else ""
    return _section("Versions", f"align-stack {code['version']}{sha}, python {item.manifest['python']}, " + ", ".join(f"{key} {value}" for key, value in libraries.items() if value) + ".")


def _licence(facts: Facts) -> str:
    stated = facts.licence or "**Not stated.** Fill in `license` at the top of this file (and take `license_name` out): a model inherits obligations from its base model and its data."
    return _section("Licence", stated)


def told(value: Any) -> Any:
    """A record without what says nothing: null, and mappings, lists and texts that are empty or come to be."""
    if isinstance(value, Mapping):
        return {key: kept for key, item in value.items() if (kept := told(item)) not in (None, {}, [], "")}
    if isinstance(value, list):
        return [kept for item in value if (kept := told(item)) not in (None, {}, [], "")]
    return value


def public(text: str) -> str:
    """Text with the last part of every absolute path in it."""
    return _PATH.sub(r"\1", text)


def _public_values(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _public_values(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_public_values(item) for item in value]
    if isinstance(value, str) and value.startswith(("/", "~")):
        return PurePath(value).name
    return public(value) if isinstance(value, str) else value


def _section(title: str, body: str) -> str:
    return f"## {title}\n\n{body}" if body else ""


def _block(language: str, text: str) -> str:
    """A fenced block; the fence is longer than any run of backticks in the text."""
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall(r"`+", text))])
    return f"{fence}{language}\n{printable(text)}\n{fence}" if text else ""


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(inert(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def inert(text: str) -> str:
    """Text of a manifest or an evaluation as one line of Markdown that is text: no HTML, no link, no code, nothing that a terminal obeys."""
    return printable(" ".join(text.split())).replace("&", "&amp;").replace("<", "&lt;").replace("](", "]\\(").replace("`", "'")


def _number(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _flat(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {f'({inner})' if isinstance(item, Mapping) else inner}" for key, item in value.items() if (inner := _flat(item)))
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (list, str)) else _number(value)
