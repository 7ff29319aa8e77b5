"""Which prompts an evaluation uses, and the fingerprint that says when two evaluations may be compared."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from configs.errors import UserError
from configs.schema import EvalConfig
from stages.data.fingerprint import fingerprint
from stages.data.read import read_prompts
from stages.data.rows import Prompt
from stages.data.split import Splitter, one_per_group
from stages.models import Origin, uses_bf16
from stages.registry import contract


def choose_prompts(cfg: EvalConfig) -> list[Prompt]:
    """The prompts of the chosen subset, each prompt group once, in file order, at most cfg.max_prompts.

    Raises UserError when the subset is empty: every other prompt has been (or may be) trained on.
    """
    rows = read_prompts(cfg.prompts).rows
    if cfg.subset == "all":
        chosen = list(rows)
    else:
        splitter = Splitter(cfg.split)
        chosen = [row for row in rows if splitter.of(row) == cfg.subset]
    if not chosen:
        files = ", ".join(source.path for source in cfg.prompts)
        raise UserError(
            f"{files}: none of {len(rows)} prompts is in the {cfg.subset} subset (split.seed {cfg.split.seed}, split.{cfg.subset} "
            f"{getattr(cfg.split, cfg.subset, 0)}); the others are for training. Add prompts, name them in split.test_prompts, or set "
            "subset: all if no stage has trained on this file"
        )
    return one_per_group(chosen)[: cfg.max_prompts]


def check_split(origins: Iterable[Origin], cfg: EvalConfig) -> None:
    """Raise UserError where a model or what it descends from was trained under another split: it may have seen our test prompts."""
    if cfg.subset == "all":
        return
    split = Splitter(cfg.split).facts()
    for origin in origins:
        contract.check_split(origin.ancestors(), split, "set subset: all if no stage has trained on this file")


def eval_set(cfg: EvalConfig, prompts: Sequence[Prompt], scorer_ids: dict[str, str]) -> tuple[str, dict[str, Any]]:
    """The fingerprint of an evaluation set (16 hex digits) and what it is made of.

    Two results with one fingerprint come from the same prompts, sampling, scorers, seed and precision. scorer_ids: registry name of a reward
    model -> its checkpoint id, because a name such as reward/demo@latest moves on.
    """
    from blake3 import blake3

    sampling = cfg.sampling.model_dump(exclude={"generate_batch_size"})  # completions do not depend on it
    scorers = [_scorer_identity(spec.model_dump(mode="json"), scorer_ids) for spec in cfg.scorers]
    detail = {
        "prompts": fingerprint(prompts), "count": len(prompts), "subset": cfg.subset, "samples_per_prompt": cfg.samples_per_prompt,
        "sampling": sampling, "scorers": scorers, "seed": cfg.seed, "precision": "bf16" if uses_bf16(cfg.precision) else "fp32",
    }  # fmt: skip
    return blake3(json.dumps(detail, sort_keys=True).encode()).hexdigest()[:16], detail


def _scorer_identity(spec: dict[str, Any], scorer_ids: dict[str, str]) -> dict[str, Any]:
    """A scorer's spec with what its name alone does not say: the checkpoint's id, or a hash of the function's source."""
    if spec["kind"] == "model":
        return spec | {"id": scorer_ids[spec["checkpoint"]]}
    if spec["kind"] == "ensemble":
        return spec | {"ids": [scorer_ids[name] for name in spec["checkpoints"]]}
    if spec["kind"] == "python":
        from rewards.python import source_digest

        source = source_digest(spec["function"])
        return spec | ({"source": source} if source else {})
    return spec
