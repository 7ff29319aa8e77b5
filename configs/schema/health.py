"""Schema of the health checks: which are made, at which thresholds, and what a failed one does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from configs.schema.common import PositiveInt, Strict

CheckName = Literal[
    "negative_kl", "ratio_explosion", "first_step", "clip_fraction", "entropy_collapse", "no_eos", "length_drift", "short_completions",
    "explained_variance", "value_clip", "flat_scores", "score_clipped", "sampler_gap", "skipped_steps", "over_optimisation",
]  # fmt: skip
SFTCheckName = Literal["overfitting", "forgetting", "leakage_like_loss", "flat_loss", "learning_rate_too_high", "dropped_rows"]


class Checks(Strict):
    """What every stage's checks have: what a failed one does, and which are left out."""

    action: Literal["warn", "stop", "off"] = Field(
        default="warn", description="What a check that starts to fail does: print a warning, save and stop the run (the same command goes on), or nothing."
    )
    ignore: Sequence[str] = Field(default=(), description="Names of checks that are not made.")


class Health(Checks):
    """Checks of every iteration's metrics, each with a name, a cause and a remedy."""

    ignore: list[CheckName] = Field(default_factory=list, description="Names of checks that are not made.")
    grace_iterations: PositiveInt = Field(
        default=10, description="Iterations after train.value_warmup_iterations in which the value function may still explain nothing."
    )
    max_ratio: float = Field(default=10.0, gt=1, description="ratio_explosion: largest ratio of new to old probability of a token.")
    max_clip_fraction: float = Field(default=0.4, gt=0, le=1, description="clip_fraction: share of an iteration's tokens whose ratio is clipped.")
    min_entropy_share: float = Field(default=0.1, ge=0, lt=1, description="entropy_collapse: entropy per token, as a share of the first iteration's.")
    max_length_factor: float = Field(default=2.0, gt=1, description="length_drift: how many times longer or shorter completions may become.")
    max_sampler_gap: float = Field(default=0.5, gt=0, description="sampler_gap: largest difference between the sampler's log-prob of a token and the forward's, nats.")


class SFTHealth(Checks):
    """Checks of an SFT run's data, losses and what it forgets, each with a name, a cause and a remedy."""

    ignore: list[SFTCheckName] = Field(default_factory=list, description="Names of checks that are not made.")
    plain_text: Path | None = Field(
        default=None, description="forgetting: a UTF-8 text file whose perplexity is measured at the start and every train.eval_every steps (its first 20,000 tokens)."
    )
    general_prompts: Path | None = Field(
        default=None, description="forgetting: a prompts file; the starting model answers its first 32 prompts greedily (32 tokens), and how likely those answers stay is measured."
    )
    max_perplexity_growth: float = Field(default=1.5, gt=1, description="forgetting: perplexity of plain_text, in multiples of what it was at the start.")
    max_logprob_drop: float = Field(default=1.0, gt=0, description="forgetting: by how much the mean log-prob of a token of the old answers may fall, nats.")
    rising_evaluations: PositiveInt = Field(default=3, description="overfitting: evaluations in a row whose loss is above the lowest one while the training loss falls.")
    min_rise: float = Field(default=0.02, ge=0, description="overfitting: share of the lowest validation loss by which each of them is above it.")
    max_gap: float = Field(default=0.1, ge=0, description="overfitting: validation loss above training loss that is tolerated, nats per token.")
    min_first_loss: float = Field(default=0.05, ge=0, description="leakage_like_loss: training loss of the first log (within 50 steps) below which it is suspicious, nats per token.")
    min_validation_share: float = Field(
        default=0.5, ge=0, lt=1, description="leakage_like_loss: share of the training loss around it below which a validation loss is suspicious."
    )
    max_duplicates: float = Field(default=0.05, ge=0, le=1, description="leakage_like_loss: share of validation rows that may be (nearly) the same as a training row.")
    flat_steps: PositiveInt = Field(default=50, description="flat_loss: optimizer steps after the warm-up by which the training loss must have fallen beyond its noise.")
    max_loss_rise: float = Field(default=0.2, gt=0, description="learning_rate_too_high: share of its first value by which the training loss may rise above its lowest.")
    max_norm_growth: float = Field(default=10.0, gt=1, description="learning_rate_too_high: gradient norm, in multiples of what it was at the start.")
    max_skipped: float = Field(default=0.02, ge=0, lt=1, description="learning_rate_too_high: share of the optimizer steps that the guard may skip.")
    max_dropped: float = Field(default=0.1, ge=0, le=1, description="dropped_rows: share of the training rows that may be dropped because they exceed max_length.")
