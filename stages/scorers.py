"""Trained reward models as scorers: loaded from the registry for PPO and for evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rewards.model import RewardModelScorer
from stages import models, soft
from stages.tokens import load_tokens


def reward_scorer(
    asked: str, registry_root: Path, *, device: Any = None, batch_size: int = 32, attn_implementation: str | None = None
) -> RewardModelScorer:
    """The scorer of a published reward model in float32, with its own tokenizer and template, centred by nobody yet.

    Raises:
        UserError: the checkpoint is not a reward model, or is damaged.
    """
    origin = models.find(asked, registry_root, stages=("reward",))
    model = models.load_scorer(origin, attn_implementation=attn_implementation)
    return scorer_of(origin, model.to(device) if device is not None else model, batch_size=batch_size)


def scorer_of(origin: models.Origin, model: Any, *, batch_size: int, head: Any = None, kind: Any = RewardModelScorer, **extra: Any) -> Any:
    """Wrap a loaded reward model; `kind` is the scorer class."""
    from stages.registry import contract

    assert origin.checkpoint is not None
    contract.check_score_position(origin.checkpoint)
    tokens, stage_info = load_tokens(origin), origin.checkpoint.info("stage_info")
    scorer = kind(
        model, tokens.formatter, name=origin.checkpoint.ref.split("@")[0], pad_id=tokens.pad_id, eos_ids=tokens.eos_ids,
        token_key=tokens.key, mean=stage_info["mean"], std=stage_info["std"] or 1.0, batch_size=batch_size, head=head, **extra,
    )  # fmt: skip
    scorer.max_length = soft.room(model)
    return scorer
