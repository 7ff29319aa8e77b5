"""Schema of a sweep: which fields are tried with which values, by what the trials are judged, and how many run."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from configs.schema.common import PositiveInt, Strict


class Range(Strict):
    """Numbers from low to high, both included."""

    low: int | float = Field(description="Smallest value.")
    high: int | float = Field(description="Largest value.")
    log: bool = Field(default=False, description="Draw evenly in the logarithm: as many between 1e-5 and 1e-4 as between 1e-4 and 1e-3.")
    step: int | float | None = Field(default=None, gt=0, description="Only low, low + step, low + 2 step …; null is every number.")

    @model_validator(mode="after")
    def _has_values(self) -> Range:
        if self.low >= self.high:
            raise ValueError(f"low {self.low:g} must be below high {self.high:g}; for one value set the field itself")
        if self.log and self.low <= 0:
            raise ValueError(f"low {self.low:g}: a range with log: true must lie above 0")
        if self.log and self.step is not None:
            raise ValueError("step and log: true do not go together; leave one out, or list the values")
        return self


class Sweep(Strict):
    """Trials of a chain, or of one stage, that differ in some fields (`align sweep`)."""

    space: dict[str, Range | list[Any]] = Field(
        default_factory=dict,
        description="Field, such as sft.train.learning_rate -> its range {low, high, log, step} or the list of its values. Empty: the learning rate of the first stage that "
        "trains, from a tenth to ten times what the config says, log-uniform.",
    )
    metric: str | None = Field(
        default=None,
        description="What a trial is judged by: a name of its stage's metrics.jsonl (evaluation/loss, sft/token_accuracy), of the published checkpoint's metrics (ece), or of the "
        "chain's evaluation on held-out prompts that are not its test part (eval/ppo/score). Null: what the stage chooses its published state by (evaluation.metric), else the validation loss.",
    )
    stage: Literal["sft", "reward", "dpo", "ppo", "eval"] | None = Field(default=None, description="The stage that the metric is of; null is told by the metric's name, or is the last one that is swept.")
    goal: Literal["min", "max"] | None = Field(default=None, description="Null: min for names that end in loss, perplexity, kl, kl_k3, ece or error, else max.")
    trials: PositiveInt = Field(default=12, description="Trials in all, the config's own values first among them; a grid tries every combination, whatever this says.")
    jobs: PositiveInt = Field(default=1, description="Trials that run at once; the GPUs, or the CPU's threads, are shared out among them.")
    sampler: Literal["tpe", "random", "grid"] = Field(default="tpe", description="What draws the values: a tree-structured Parzen estimator, chance, or every combination in turn.")
    pruner: Literal["halving", "median", "none"] = Field(
        default="halving",
        description="What ends a trial early: halving, asynchronous successive halving over its evaluations (arXiv:1810.05934); median, when it is worse than half of the others were there.",
    )
    reduction: int = Field(default=3, ge=2, description="halving: of the trials that reach evaluation 1, this, this squared … the best one of so many go on.")
    evaluations: PositiveInt = Field(default=9, description="Evaluations of a trial, spread over its steps, where the stage's train.eval_every says nothing.")
    seed: int = Field(default=0, description="Seed of the draws: values of the trial with a given number do not depend on jobs or interruptions, unless the sampler learns from results.")
    timeout: float | None = Field(default=None, gt=0, description="Minutes after which no further trial is begun; those that run are finished.")
    keep: PositiveInt | None = Field(default=None, description="Published checkpoints stay of the best so many trials only; null keeps those of every trial that was not stopped early.")
    give_up: PositiveInt = Field(default=3, description="End the sweep with the error when the first so many trials fail alike.")
    output: Path | None = Field(default=None, description="Folder of the study, its trials and results; null is OUTPUT/sweep of the chain.")
