"""Schema of PPO's health checks: which are made, at which thresholds, and what a failed one does."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from configs.schema.common import PositiveInt, Strict

CheckName = Literal[
    "negative_kl", "ratio_explosion", "first_step", "clip_fraction", "entropy_collapse", "no_eos", "length_drift", "short_completions",
    "explained_variance", "value_clip", "flat_scores", "score_clipped", "sampler_gap", "skipped_steps", "over_optimisation",
]  # fmt: skip


class Health(Strict):
    """Checks of every iteration's metrics, each with a name, a cause and a remedy."""

    action: Literal["warn", "stop", "off"] = Field(
        default="warn", description="What a check that starts to fail does: print a warning, save and stop the run (the same command goes on), or nothing."
    )
    ignore: list[CheckName] = Field(default_factory=list, description="Names of checks that are not made.")
    grace_iterations: PositiveInt = Field(
        default=10, description="Iterations after train.value_warmup_iterations in which the value function may still explain nothing."
    )
    max_ratio: float = Field(default=10.0, gt=1, description="ratio_explosion: largest ratio of new to old probability of a token.")
    max_clip_fraction: float = Field(default=0.4, gt=0, le=1, description="clip_fraction: share of an iteration's tokens whose ratio is clipped.")
    min_entropy_share: float = Field(default=0.1, ge=0, lt=1, description="entropy_collapse: entropy per token, as a share of the first iteration's.")
    max_length_factor: float = Field(default=2.0, gt=1, description="length_drift: how many times longer or shorter completions may become.")
    max_sampler_gap: float = Field(default=0.5, gt=0, description="sampler_gap: largest difference between the sampler's log-prob of a token and the forward's, nats.")
