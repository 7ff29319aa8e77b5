"""The contract between stages: does this parent fit what is about to be done? Pure functions of recorded facts.

Each returns None or raises UserError saying what was found, what was expected and what to do.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from configs.errors import UserError
from stages.registry.finite import nonfinite_tensors
from stages.registry.manifest import Checkpoint, folder_digest


def check_stage(checkpoint: Checkpoint, stage: str | Iterable[str]) -> None:
    """The checkpoint comes from (one of) the stage(s)."""
    wanted = (stage,) if isinstance(stage, str) else tuple(stage)
    if checkpoint.stage not in wanted:
        raise UserError(
            f"{checkpoint.ref} is a checkpoint of stage {checkpoint.stage!r}, expected {' or '.join(map(repr, wanted))}. "
            f"Name a checkpoint of that stage, such as {wanted[0]}/{checkpoint.name}"
        )


def check_same_tokenizer(checkpoint: Checkpoint, other: Checkpoint | Mapping[str, Any]) -> None:
    """Both were made with one tokenizer. `other`: a checkpoint, or the facts {"digest", …} of a loaded tokenizer."""
    _same(checkpoint, other, "digest", "tokenizer", "token ids of one mean other text to the other")


def check_template(checkpoint: Checkpoint, other: Checkpoint | Mapping[str, Any]) -> None:
    """Both were made with one chat template. `other`: a checkpoint, or the facts {"template_digest", …}."""
    _same(
        checkpoint,
        other,
        "template_digest",
        "chat template",
        "prompts would be laid out unlike those it was trained on",
        "Leave `template` out (auto takes the checkpoint's own), or use checkpoints that descend from one model",
    )


def check_pad_eos(facts: Mapping[str, Any], where: str) -> None:
    """Padding is not an end of text: otherwise masks built from the pad id hide the EOS from the loss and the scorer.

    facts: {"eos_ids": [...], "pad_id": n}, as in a manifest's `tokenizer`.
    """
    pad, eos = facts.get("pad_id"), list(facts.get("eos_ids") or [])
    if pad is None or not eos:
        missing = "pad token" if pad is None else "end-of-text token"
        raise UserError(f"{where}: its tokenizer has no {missing}. Set it in the tokenizer and train the stage again")
    if pad in eos:
        raise UserError(
            f"{where}: pad token and end-of-text token are both id {pad}, so the end of a completion is taken for "
            "padding. Give the tokenizer a pad token of its own and train the stage again"
        )


def check_base_under_adapter(
    checkpoint: Checkpoint, base: Checkpoint | str | Path, base_digest: str | None = None
) -> None:
    """An adapter is put on the base it was trained on. Fine when the checkpoint is no adapter.

    base: a checkpoint, its id, or the path or name of an outside model; base_digest: of the outside model, computed
    from its folder when left out. Reads stage_info["adapter"] = {"base", "base_id", "base_digest"}.
    """
    adapter = (checkpoint.info("stage_info") or {}).get("adapter")
    if not adapter:
        return
    trained_on = adapter.get("base_id") or adapter.get("base")
    if isinstance(base, Checkpoint):
        fits, found = trained_on == base.id, f"{base.ref} ({base.id})"
    elif adapter.get("base_id"):
        fits, found = trained_on == str(base), str(base)
    else:
        digest = base_digest or (folder_digest(Path(base)) if Path(base).is_dir() else None)
        known = adapter.get("base_digest")
        fits = known == digest if known and digest else str(trained_on) == str(base)
        found = f"{base} (files {digest[:12]}…, trained on files {known[:12]}…)" if known and digest else str(base)
    if not fits:
        raise UserError(
            f"{checkpoint.ref} is an adapter trained on {trained_on}, and would be put on {found}: its weights mean "
            "nothing there. Use the base it was trained on, or train the adapter again on this one"
        )


def check_split(family: Sequence[Checkpoint], split: Mapping[str, Any], advice: str) -> None:
    """A model and all it descends from were trained under one split: otherwise prompts held out here were trained on there.

    family: the model first. split: facts {"seed", "validation", "test", "always_test"} as in a manifest's data.split. Fine for a
    checkpoint that records no split.
    """
    for checkpoint in family:
        theirs = (checkpoint.info("data") or {}).get("split")
        if not theirs:
            continue
        differing = [key for key in ("seed", "validation", "test") if theirs.get(key) != split[key]]
        said = [f"split.{key} is {split[key]} here and {theirs.get(key)} there" for key in differing]
        said += ["split.test_prompts names other prompts here than there"] if theirs.get("always_test") != split["always_test"] else []
        if said:
            descent = "" if checkpoint is family[0] else f", from which {family[0].ref} descends,"
            raise UserError(
                f"{checkpoint.ref}{descent} was trained under another split: {', '.join(said)}; it may have seen prompts that are held "
                f"out here. Use its split, or {advice}"
            )


def check_score_position(checkpoint: Checkpoint, expected: str = "last_token") -> None:
    """The reward model reads its score where rollouts end."""
    found = (checkpoint.info("stage_info") or {}).get("score_position")
    if found != expected:
        raise UserError(
            f"{checkpoint.ref} reads its score at {found or 'a place it does not record'}, rollouts are scored at {expected}: "
            "the scores would be meaningless. Train the reward model again with this version"
        )


def check_healthy(checkpoint: Checkpoint) -> None:
    """Nothing it records is NaN or infinite, and neither are its weights."""
    for key in ("metrics", "stage_info"):
        for name, value in _leaves(checkpoint.info(key) or {}, key):
            if value in ("nan", "inf", "-inf") or (isinstance(value, float) and not math.isfinite(value)):
                raise UserError(
                    f"{checkpoint.ref} records {name} = {value}: the run that made it went wrong. Name another version, or "
                    "train it again with a lower learning rate"
                )
    check_finite(checkpoint.model_dir, checkpoint.ref)


def check_finite(model_dir: Path, what: str | None = None) -> None:
    """No NaN and no infinity in any *.safetensors below `model_dir`. Raises UserError naming tensor and file."""
    for file in sorted(model_dir.rglob("*.safetensors")):
        for tensor, count in nonfinite_tensors(file):
            raise UserError(
                f"{what or 'the checkpoint'}: {count} of the numbers in tensor {tensor!r} of {file.name} are NaN or infinite. "
                "Training diverged: use an earlier checkpoint, a lower learning rate or fp32/bf16 instead of fp16"
            )


def _same(
    checkpoint: Checkpoint, other: Checkpoint | Mapping[str, Any], key: str, what: str, why: str, advice: str = "Use checkpoints that descend from one model"
) -> None:
    name = other.ref if isinstance(other, Checkpoint) else str(other.get("name", "the one given here"))
    facts = (other.info("tokenizer") or {}) if isinstance(other, Checkpoint) else other
    mine = (checkpoint.info("tokenizer") or {}).get(key)
    theirs = facts.get(key)
    if mine is None or theirs is None:
        lacking = checkpoint.ref if mine is None else name
        raise UserError(f"{lacking} does not record its {what} ({key}), so it cannot be checked. Publish it again")
    if mine != theirs:
        raise UserError(
            f"{checkpoint.ref} and {name} have different {what}s ({mine[:12]}… and {theirs[:12]}…): {why}. {advice}"
        )


def _leaves(value: Any, where: str) -> Iterable[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, f"{where}.{key}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _leaves(item, f"{where}[{index}]")
    else:
        yield where, value
