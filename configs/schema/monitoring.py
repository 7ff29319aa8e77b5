"""Schema of what watches a PPO run: evaluation on held-out prompts, and when to stop."""

from __future__ import annotations

from pydantic import Field

from configs.schema.common import Fraction, PositiveInt, Sources, Strict
from configs.schema.scorers import Scorers


class Evaluation(Strict):
    """Evaluation of the policy on held-out prompts: before the first iteration, every so often, and after the last."""

    every: PositiveInt = Field(default=10, description="Iterations between evaluations.")
    prompts: Sources | None = Field(
        default=None,
        description="Held-out prompts; null is the validation part of the run's `prompts`, and without one there is no evaluation. Prompts of the test "
        "part and prompts that are trained on are left out.",
    )
    max_prompts: PositiveInt | None = Field(default=64, description="Use the first so many prompts.")
    samples_per_prompt: PositiveInt = Field(default=4, description="Completions per prompt.")
    scorers: Scorers | None = Field(
        default=None,
        description="Held-out scorers, which PPO does not train on: a second reward model or a function. Null scores with the training scorers alone.",
    )  # fmt: skip
    metric: str = Field(
        default="evaluation/heldout_score", pattern=r"^-?evaluation/.+$",
        description="What the best checkpoint is chosen by. Lower is better for names that end in kl, kl_k3 or loss, and after a minus sign, as in -evaluation/length.",
    )  # fmt: skip
    show_samples: int = Field(default=0, ge=0, description="Prompts whose first completion is printed, and so stands in the log; samples.jsonl holds every one.")


class Stopping(Strict):
    """What ends a run before its last iteration; judged at evaluations."""

    kl_budget: float | None = Field(
        default=None, gt=0,
        description="KL to the reference in nats per completion that a published checkpoint may have; the run stops at the first evaluation above it.",
    )  # fmt: skip
    patience: PositiveInt | None = Field(default=None, description="Stop after this many evaluations without a better evaluation.metric.")
    over_optimisation: float | None = Field(
        default=0.05, gt=0, lt=1,
        description="Stop when the held-out score falls while the training score rises; needs evaluation.scorers. Chance that a run whose held-out score "
        "never falls is stopped for it, over all its evaluations; null never stops for it.",
    )  # fmt: skip
    tolerated_fall: Fraction = Field(default=0.1, description="Share of the held-out score's gain since the start that it may lose again before that counts.")
