"""Schema of the evaluation of checkpoints on held-out prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from configs.schema.common import PositiveInt, Sources, Split, Strict
from configs.schema.ppo import Sampling
from configs.schema.scorers import Scorers


class EvalSettings(Strict):
    """What is measured; the checkpoints are named beside it."""

    prompts: Sources = Field(description="Prompts to complete.")
    subset: Literal["test", "validation", "all"] = Field(default="test", description="Which part of the split is used.")
    scorers: Scorers = Field(description="What scores a completion; never the one a policy was trained on, if you can help it.")
    max_prompts: PositiveInt | None = Field(default=None, description="Use the first so many prompts of the subset.")
    samples_per_prompt: PositiveInt = Field(default=1, description="Completions per prompt.")
    sampling: Sampling = Field(default_factory=Sampling, description="How completions are sampled.")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        default="fp32", description="Weights and arithmetic of the models: bf16 takes half the memory and rounds off small differences; merged adapters stay fp32."
    )
    plain_text: Path | None = Field(default=None, description="A text file: its perplexity shows what was forgotten.")
    show_samples: int = Field(default=0, ge=0, description="Prompts whose completions are printed side by side, and so stand in the log; samples.jsonl holds every one.")


class EvalConfig(EvalSettings):
    """Evaluation of checkpoints, as `align eval` runs it."""

    registry: Path = Field(default=Path("runs/registry"), description="The checkpoint registry, a directory.")
    checkpoints: dict[str, str] = Field(min_length=1, description="Label -> registry name, Hugging Face folder or model name.")
    against: str | None = Field(default=None, description="Label that win rates are counted against; null is the first.")
    reference: str | None = Field(default=None, description="Label that KL is measured to; null is `against`.")
    seed: int = Field(default=0, description="Seed of sampling and of the bootstrap.")
    template: str = Field(default="auto", description="Chat template of models that carry none.")
    attn_implementation: str | None = Field(default=None, description="Attention kernel as transformers names it: sdpa, eager, flash_attention_2.")
    split: Split = Field(default_factory=Split, description="The split of the chain.")
    output: Path | None = Field(default=None, description="Folder for results.json and samples.jsonl; null writes none.")
