"""The `trainer:` section: its keys are those of the stage's TRL config class, read from TRL's source without importing it.

Importing TRL takes seconds; its config classes are plain dataclasses, so their fields and types are read from the
installed files by `ast` in milliseconds. Where a file is not laid out as expected, the class is imported instead.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import importlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CLASSES = {"sft": "SFTConfig", "reward": "RewardConfig", "dpo": "DPOConfig"}
KINDS_WITH_TRAINER = tuple(CLASSES)

_TOKENISED = "nothing: rows are tokenised before the trainer sees them"
_SPECIAL = "nothing: the end-of-text and padding tokens are the tokenizer's"
_ORDER = "nothing: the order of the rows follows from seed and every batch is full"
_TOKEN = "nothing: a token in a config would be kept with the checkpoint; `hf auth login` or the variable HF_TOKEN is where libraries look for it"
_SAVES = "nothing: a stage keeps the saves that it resumes from itself"
_OURS = {
    "learning_rate": "train.learning_rate",
    "per_device_train_batch_size": "train.micro_batch_size",
    "per_device_eval_batch_size": "train.micro_batch_size",
    "auto_find_batch_size": "train.batch_size and train.micro_batch_size",
    "gradient_accumulation_steps": "train.batch_size (per optimizer step, over all processes)",
    "num_train_epochs": "train.epochs",
    "max_steps": "train.max_steps",
    "lr_scheduler_type": "train.schedule",
    "warmup_ratio": "train.warmup",
    "warmup_steps": "train.warmup",
    "weight_decay": "train.weight_decay",
    "max_grad_norm": "train.max_grad_norm",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "gradient_checkpointing": "train.gradient_checkpointing",
    "logging_steps": "train.log_every",
    "logging_strategy": "train.log_every",
    "eval_steps": "train.eval_every",
    "eval_strategy": "train.eval_every",
    "do_eval": "train.eval_every",
    "save_steps": "train.save_every",
    "save_strategy": "train.save_every",
    "load_best_model_at_end": "train.early_stopping_patience",
    "output_dir": "output",
    "seed": "seed",
    "data_seed": "seed",
    "max_length": "max_length",
    "trust_remote_code": "nothing: remote code is off",
    "chat_template_path": "template",
    "hub_token": _TOKEN,
    "push_to_hub_token": _TOKEN,
    "push_to_hub": "nothing: a checkpoint is published in the registry",
    "push_to_hub_model_id": "nothing: a checkpoint is published in the registry",
    "push_to_hub_organization": "nothing: a checkpoint is published in the registry",
    "hub_always_push": "nothing: a checkpoint is published in the registry",
    "resume_from_checkpoint": "nothing: an interrupted stage continues by itself",
    "use_cpu": "machine",
    "deepspeed": "machine",
    "fsdp": "machine",
    "fsdp_config": "machine",
    "model_init_kwargs": "attn_implementation (and init_from)",
    "remove_unused_columns": _TOKENISED,
    "dataset_kwargs": _TOKENISED,
    "dataset_num_proc": _TOKENISED,
    "dataset_text_field": "data",
    "truncation_mode": "max_length (and overlong)",
    "eos_token": _SPECIAL,
    "pad_token": _SPECIAL,
    "disable_dropout": "nothing: dropout is off in every stage",
    "shuffle_dataset": _ORDER,
    "train_sampling_strategy": _ORDER,
    "dataloader_drop_last": _ORDER,
    "ignore_data_skip": _ORDER,
    "eval_on_start": "nothing: evaluations come every train.eval_every steps",
    "metric_for_best_model": "nothing: the best state is the one with the lowest validation loss",
    "greater_is_better": "nothing: the best state is the one with the lowest validation loss",
    "average_tokens_across_devices": "nothing: losses are means over all processes",
    "save_total_limit": _SAVES,
    "save_only_model": _SAVES,
    "restore_callback_states_from_checkpoint": _SAVES,
    "logging_nan_inf_filter": "nothing: a loss of NaN is shown as it is",
    "enable_jit_checkpoint": "nothing: stages save on SIGTERM themselves",
}
OUR_FIELDS: dict[str, dict[str, str]] = {
    "sft": {
        **_OURS,
        "metric_for_best_model": "evaluation.metric",
        "greater_is_better": "evaluation.mode",
        "packing": "packing",
        "eval_packing": "packing",
        "padding_free": "packing",
        "packing_strategy": "packing",
        "loss_type": "nothing: the loss is the mean over completion tokens",
        "assistant_only_loss": "loss_on",
        "completion_only_loss": "nothing: the loss covers completions (see loss_on)",
        "neftune_noise_alpha": "train.neftune_alpha",
        "disable_dropout": "train.dropout",
        "label_smoothing_factor": "train.label_smoothing",
    },
    "reward": {**_OURS, "center_rewards_coefficient": "center_coefficient"},
    "dpo": {
        **_OURS,
        "beta": "beta",
        "loss_type": "loss_type",
        "label_smoothing": "label_smoothing",
        "padding_free": "nothing: pairs are padded",
        "precompute_ref_log_probs": "nothing: reference log-probs are computed with the policy's",
        "sync_ref_model": "nothing: the reference stays as it is",
    },
}
"""TRL's argument -> the field of ours that sets it."""


def check_trainer(kind: str, arguments: Mapping[str, Any]) -> list[str]:
    """Problems of a `trainer:` section, each as "key: what is wrong"; [] is good."""
    return [f"{key}: {message}" for key, message in trainer_problems(kind, arguments)]


def trainer_problems(kind: str, arguments: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Problems of a `trainer:` section as (key, what is wrong). `kind` is sft, reward or dpo."""
    if not arguments:
        return []
    fields, ours, problems = trainer_fields(kind), OUR_FIELDS[kind], []
    for key, value in arguments.items():
        if key in ours:
            use = ours[key]
            advice = use.removeprefix("nothing: ") if use.startswith("nothing: ") else f"set `{use}` instead"
            problems.append((key, f"the stage sets this itself; {advice}"))
        elif key not in fields:
            close = difflib.get_close_matches(key, fields, n=1)
            hint = f". Did you mean {close[0]!r}?" if close else ""
            problems.append((key, f"{CLASSES[kind]} has no such argument{hint}"))
        elif not _fits(value, fields[key]):
            problems.append((key, f"found {value!r}; expected {_name_of(fields[key])}"))
    return problems


@functools.cache
def trainer_fields(kind: str) -> dict[str, str]:
    """The arguments of the stage's TRL config class -> their annotation as text."""
    return _from_source(CLASSES[kind]) or _from_class(CLASSES[kind])


def _from_source(name: str) -> dict[str, str]:
    """Fields of trl.NAME and its bases by reading files; {} where they are not laid out as expected."""
    trl, transformers = _folder("trl"), _folder("transformers")
    if trl is None or transformers is None:
        return {}
    files = [
        (transformers / "training_args.py", "TrainingArguments"),
        (trl / "trainer" / "base_config.py", "_BaseConfig"),
        (trl / "trainer" / f"{name.removesuffix('Config').lower()}_config.py", name),
    ]
    fields: dict[str, str] = {}
    below = None
    for path, cls in files:
        found = _class_fields(path, cls, below)
        if found is None:
            return {}
        fields.update(found)
        below = cls
    return fields


def _folder(package: str) -> Path | None:
    spec = importlib.util.find_spec(package)
    return Path(spec.origin).parent if spec and spec.origin else None


def _class_fields(path: Path, name: str, base: str | None) -> dict[str, str] | None:
    """The annotated names of a class whose only base is `base`; None where there is no such class."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError):
        return None
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            if [ast.unparse(b) for b in node.bases] != ([base] if base else []):
                return None
            rows = [item for item in node.body if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)]
            return {ast.unparse(item.target): ast.unparse(item.annotation) for item in rows if "ClassVar" not in ast.unparse(item.annotation)}
    return None


def _from_class(name: str) -> dict[str, str]:
    """The same from the class itself: seconds, for a TRL that is laid out otherwise."""
    cls = getattr(importlib.import_module("trl"), name)
    return {f.name: f.type if isinstance(f.type, str) else getattr(f.type, "__name__", str(f.type)) for f in dataclasses.fields(cls) if f.init}


def _fits(value: Any, annotation: str) -> bool:
    """Whether a YAML value may be meant by an annotation such as `float | None`; unknown types are left to TRL."""
    checks = {
        "int": lambda v: isinstance(v, int) and not isinstance(v, bool),
        "float": lambda v: isinstance(v, int | float) and not isinstance(v, bool),
        "bool": lambda v: isinstance(v, bool),
        "str": lambda v: isinstance(v, str),
        "dict": lambda v: isinstance(v, dict),
        "list": lambda v: isinstance(v, list),
        "None": lambda v: v is None,
    }
    members = _members(annotation)
    return any(member not in checks or checks[member](value) for member in members)


def _members(annotation: str) -> list[str]:
    """`dict[str, Any] | str | None` -> [dict, str, None]."""
    try:
        tree: ast.expr = ast.parse(annotation, mode="eval").body
    except SyntaxError:
        return [annotation]
    parts: list[str] = []

    def walk(node: ast.expr) -> None:
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
            walk(node.left)
            walk(node.right)
        elif isinstance(node, ast.Subscript) and ast.unparse(node.value) in ("Optional", "Union"):
            for item in node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]:
                walk(item)
            if ast.unparse(node.value) == "Optional":
                parts.append("None")
        elif isinstance(node, ast.Subscript):
            parts.append(ast.unparse(node.value))
        else:
            parts.append(ast.unparse(node))

    walk(tree)
    return parts


def _name_of(annotation: str) -> str:
    names = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "dict": "a mapping", "list": "a list", "None": "null"}
    return " or ".join(names.get(member, member) for member in _members(annotation))
