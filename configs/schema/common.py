"""What the schemas share: strict models, data sources, splits, training and adapter settings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

NAME_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,63}$"
Fraction = Annotated[float, Field(ge=0, lt=1)]
PositiveInt = Annotated[int, Field(ge=1)]


class Strict(BaseModel):
    """Unknown keys are errors, values are not coerced across types, instances do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def _as_list(value: Any) -> Any:
    """Accept one source (a path or a mapping) where a list is meant."""
    if isinstance(value, (str, Path, dict)):
        return [value]
    return value


def _as_source(value: Any) -> Any:
    """Accept a bare path where a source mapping is meant."""
    return {"path": str(value)} if isinstance(value, (str, Path)) else value


class Source(Strict):
    """One file or Hugging Face dataset, how its rows are read, and how often they are used."""

    path: str = Field(description="A .jsonl, .json, .csv or .parquet file, or hf:OWNER/DATASET for a Hugging Face dataset.")
    format: Literal["auto", "messages", "prompt_completion", "alpaca", "sharegpt", "preference", "hh", "text"] = Field(
        default="auto", description="How a row is laid out; auto recognises it from the columns of the first row."
    )
    columns: dict[str, str] = Field(
        default_factory=dict, description="Our column name -> the file's column name, such as {prompt: question}."
    )
    weight: float = Field(
        default=1.0, gt=0, description="How often the rows are used per epoch: 0.5 takes a seeded half, 2 takes each twice."
    )
    limit: PositiveInt | None = Field(default=None, description="Read at most this many rows.")
    hf_split: str = Field(default="train", description="The split of a Hugging Face dataset.")
    revision: str | None = Field(default=None, description="The revision of a Hugging Face dataset.")


_SourceInput = str | Source
Sources = Annotated[
    list[Annotated[Source, BeforeValidator(_as_source, json_schema_input_type=_SourceInput)]],
    BeforeValidator(_as_list, json_schema_input_type=_SourceInput | list[_SourceInput]),
    Field(min_length=1),
]


class Split(Strict):
    """Which prompts are trained on, validated on, and kept for the final evaluation: by prompt group, in every stage alike."""

    seed: int = Field(default=0, description="Seed of the split; every stage of a chain has the same.")
    validation: Fraction = Field(default=0.05, description="Share of prompt groups for evaluation during training.")
    test: Fraction = Field(default=0.1, description="Share of prompt groups that no stage trains on.")
    test_prompts: Path | None = Field(
        default=None, description="A prompts file: these prompts are kept out of training in every stage, whatever the shares."
    )

    @model_validator(mode="after")
    def _leaves_something_to_train_on(self) -> Split:
        if self.validation + self.test >= 1:
            raise ValueError(f"validation {self.validation} + test {self.test} leave nothing to train on; their sum must be below 1")
        return self


class Lora(Strict):
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685) instead of full training."""

    rank: PositiveInt = Field(default=16, description="Rank of the update.")
    alpha: float = Field(default=32.0, gt=0, description="Scale: the update is multiplied by alpha / rank.")
    dropout: Fraction = Field(default=0.0, description="Dropout on the adapter's input; PPO needs 0.")
    target_modules: str | list[str] = Field(
        default="all-linear", description="Module names that get an adapter; all-linear takes every linear layer but the head."
    )
    rslora: bool = Field(
        default=False,
        description="Rank-stabilised (arXiv:2312.03732): the update is multiplied by alpha / sqrt(rank). For ranks of 64 and more, which otherwise learn too slowly.",
    )
    dora: bool = Field(
        default=False,
        description="Weight-decomposed (arXiv:2402.09353): a magnitude of each output is trained beside the update. For low ranks (4 to 16) that fall short of full training; slower.",
    )
    init: Literal["default", "gaussian", "pissa", "pissa_fast", "olora"] = Field(
        default="default",
        description="Where the update starts: default (0), gaussian (0, drawn otherwise), pissa (the largest singular vectors, arXiv:2404.02948; pissa_fast: approximately, for large "
        "layers) or olora (a QR decomposition, arXiv:2406.01775). The last three start from parts of the base and learn faster in few steps; the base is kept in float32, and "
        "what is published is a plain adapter of twice the rank on the unchanged base.",
    )
    learning_rate_ratio: float | None = Field(
        default=None, ge=1,
        description="LoRA+ (arXiv:2402.12354): learning rate of the B matrices over that of the A matrices, which is train.learning_rate; try 16 with half the usual rate where LoRA "
        "learns slowly. Null: one rate.",
    )  # fmt: skip
    quantization: Literal["nf4"] | None = Field(
        default=None,
        description="Keep the frozen linear layers in 4 bits (QLoRA, arXiv:2305.14314; NVIDIA GPU, extra quantization): for a base that fits into memory in no other way. PPO has "
        "`quantization` of its own.",
    )

    @model_validator(mode="after")
    def _starts_from_whole_weights(self) -> Lora:
        if self.quantization is not None and self.changes_base:
            raise ValueError(f"init: {self.init} takes its start out of the base's weights, which quantization: {self.quantization} rounds: use init: default, or leave quantization out")
        return self

    @property
    def changes_base(self) -> bool:
        """Whether training starts by moving a part of the base's weights into the adapter."""
        return self.init in ("pissa", "pissa_fast", "olora")


class Train(Strict):
    """How a stage is optimised."""

    epochs: float = Field(default=1.0, gt=0, description="Passes over the training rows.")
    max_steps: PositiveInt | None = Field(default=None, description="Stop after this many optimizer steps, whatever epochs says.")
    batch_size: PositiveInt = Field(default=32, description="Rows (or pairs) per optimizer step, over all processes.")
    micro_batch_size: PositiveInt = Field(default=8, description="Rows (or pairs) of one process per forward pass.")
    learning_rate: float = Field(default=1e-5, gt=0, description="Peak learning rate of AdamW.")
    schedule: Literal["linear", "cosine", "constant"] = Field(default="linear", description="Decay after the warm-up.")
    warmup: float = Field(default=0.03, ge=0, lt=1, description="Share of the steps in which the learning rate rises from 0.")
    weight_decay: float = Field(default=0.0, ge=0, description="Decoupled weight decay of AdamW.")
    max_grad_norm: float = Field(default=1.0, gt=0, description="Gradients are scaled down to this norm.")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        default="auto", description="Arithmetic: auto is bf16 on a GPU that has it, fp32 elsewhere."
    )
    gradient_checkpointing: bool = Field(default=False, description="Recompute activations in the backward pass: less memory, slower.")
    log_every: PositiveInt = Field(default=10, description="Optimizer steps between log lines.")
    eval_every: PositiveInt | None = Field(default=None, description="Optimizer steps between evaluations; null is once an epoch.")
    save_every: PositiveInt | None = Field(default=None, description="Optimizer steps between resumable saves; null is as eval_every.")
    early_stopping_patience: PositiveInt | None = Field(
        default=None, description="Stop after this many evaluations without a better validation loss, and publish the best."
    )


def _limit(default: float, what: str) -> Any:
    return Field(default=default, ge=0, description=f"Minutes without progress, of every process, while {what}; 0: no limit.")


class Watchdog(Strict):
    """Ends a run that hangs, with the stacks of its processes: after so long without a sign of progress, not after so long in all."""

    load: float = _limit(120, "models and saves are read (bytes that move are progress)")
    data: float = _limit(240, "data is read and tokenised (bytes that move are progress)")
    rollout: float = _limit(60, "completions are sampled (a token is progress)")
    scoring: float = _limit(60, "completions are scored and their log-probs computed (a micro-batch is progress)")
    update: float = _limit(60, "weights are updated (a micro-batch is progress)")
    eval: float = _limit(60, "the model is evaluated (a batch is progress)")
    save: float = _limit(120, "a resumable save is written (bytes that move are progress)")
    publish: float = _limit(120, "the result is written, hashed and published (bytes that move are progress)")


class StageConfig(Strict):
    """What every stage's config holds."""

    name: str = Field(pattern=NAME_PATTERN, description="The result is published as STAGE/NAME.")
    registry: Path = Field(default=Path("runs/registry"), description="The checkpoint registry, a directory.")
    output: Path | None = Field(default=None, description="Working folder for logs and resumable state; null is runs/STAGE-NAME.")
    init_from: str = Field(description="A registry name such as sft/demo@3, a Hugging Face folder, or a Hugging Face model name.")
    seed: int = Field(default=0, description="Seed of initial values, data order and sampling.")
    template: str = Field(
        default="auto",
        description="Chat template: auto is the tokenizer's own or else plain; plain, chatml, raw (prompt text, then completion text), the layout of a model family "
        "(llama3, qwen, zephyr, mistral, gemma; llama3, qwen and gemma need its special tokens; llama3 and qwen have tool turns) or a .jinja file.",
    )
    max_length: PositiveInt = Field(default=1024, description="Tokens of the longest row (prompt and completion); longer ones are handled as `overlong` says.")
    overlong: Literal["drop", "error"] = Field(default="drop", description="A row above max_length is dropped and counted, or an error.")
    split: Split = Field(default_factory=Split, description="Which prompts are trained on; the same in every stage of a chain.")
    machine: str = Field(default="auto", description="Machine file in configs/accelerate (or a path); auto takes the one that fits.")
    processes: PositiveInt | None = Field(default=None, description="Number of processes; null is the machine file's.")
    attn_implementation: str | None = Field(default=None, description="Attention kernel as transformers names it: sdpa, eager, flash_attention_2.")
    watchdog: Watchdog = Field(default_factory=Watchdog, description="When a run that hangs is ended, with the stacks of its processes in OUTPUT/hang-rank-N.txt.")
    keep_resume: bool | None = Field(
        default=None,
        description="Keep the run's newest resumable save in the registry when it publishes (several times the size of the model); align registry resume writes it out again, and gc "
        "drops it first. Null: SFT that publishes its best state (evaluation.metric, early stopping) keeps its last so; nothing else does.",
    )
    allow_changed: list[str] = Field(
        default_factory=list,
        description="Continue an interrupted run although these have changed: data, tokenizer, template, schedule, processes, config, or a field such as "
        "train.learning_rate; split: start from a model that was trained under another split.",
    )

    @field_validator("allow_changed")
    @classmethod
    def _can_be_allowed(cls, keys: list[str]) -> list[str]:
        from configs.allowed import fields_of, unknown

        if problems := unknown(keys, fields_of(cls)):
            raise ValueError("; ".join(problems))
        return keys
