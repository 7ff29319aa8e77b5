"""Schemas of the stages that TRL trains: SFT, the reward model, DPO."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from configs.schema.common import Fraction, Lora, PositiveInt, Sources, StageConfig, Train
from configs.schema.continued import Continued
from configs.schema.guard import Guard
from configs.schema.health import SFTHealth
from configs.schema.rehearsal import Rehearsal
from configs.schema.tuning import Full, LoraTuning, Technique, Tune
from configs.schema.validation import Validation


class TRLStage(StageConfig):
    """A stage behind a TRL trainer."""

    train: Train = Field(default_factory=Train, description="How the stage is optimised.")
    lora: Lora | None = Field(default=None, description="Train adapters instead of all weights; null is full training.")
    guard: Guard = Field(default_factory=Guard, description="Optimizer steps that are skipped because their numbers have gone bad.")
    trainer: dict[str, Any] = Field(
        default_factory=dict, description="Any further argument of the stage's TRL config class, under its own name."
    )

    @property
    def technique(self) -> Technique:
        """Which weights are trained, and how."""
        return Full() if self.lora is None else LoraTuning(**dict(self.lora))


class SFTTrain(Train):
    """How SFT is optimised."""

    neftune_alpha: float | None = Field(
        default=None, gt=0,
        description="Strength of uniform noise on the embeddings in training (NEFTune, arXiv:2310.05914): 5 to 15 makes answers to open questions longer and better on small sets; "
        "leave it out where answers must be exact. Null: none.",
    )  # fmt: skip
    dropout: Fraction | None = Field(
        default=None, description="Dropout of the model's own layers in training (attention, residual, embedding: those that the architecture has), for small data; adapters have their "
        "own, lora.dropout. It is off in evaluation and in what is published. Null: none.",
    )  # fmt: skip
    label_smoothing: Fraction = Field(
        default=0.0, description="Share of the target that is spread evenly over the vocabulary (0.05 to 0.1), against overconfidence; the validation loss stays the plain one."
    )
    rehearsal: Rehearsal | None = Field(default=None, description="Mix general text into every optimizer step against forgetting; null trains on `data` alone.")
    loss_chunk: PositiveInt | Literal["auto"] | None = Field(
        default="auto", description="Tokens whose logits are alive at once, in the loss and its gradient; auto: as suits the vocabulary and the device; null: TRL's own loss, "
        "which models with a loss for their experts have whatever this says."
    )
    group_by_length: bool = Field(default=False, description="Let an optimizer step have rows of like length: less padding, and steps that are less random.")


class SFTStage(TRLStage):
    """Supervised fine-tuning on demonstrations."""

    train: SFTTrain = Field(default_factory=SFTTrain, description="How the stage is optimised.")
    health: SFTHealth = Field(default_factory=SFTHealth, description="Checks of the data, of every log and of what is forgotten, and what a failed one does.")
    tune: Tune | None = Field(
        default=None, description="The technique, by `method`, or its name alone: which weights are trained, and how (align sft --compare measures them). Null is full training, or what `lora` says."
    )
    data: Sources = Field(description="Demonstrations.")
    loss_on: Literal["all", "last"] = Field(default="all", description="Assistant turns that the loss covers: all of them or the last.")
    packing: bool = Field(default=False, description="Put several rows into one sequence; refused where attention would leak between them.")
    continued: Continued | None = Field(default=None, description="Training on from init_from with new data, as `align sft --continue` writes it; null is a run of its own.")
    evaluation: Validation = Field(default_factory=Validation, description="What is measured on held-out rows, what the run stops and chooses by, and the final test.")

    @model_validator(mode="after")
    def _one_rule_of_stopping(self) -> SFTStage:
        if self.train.early_stopping_patience is not None and self.evaluation.chosen_by is not None:
            raise ValueError(
                "train.early_stopping_patience is short for evaluation.early_stopping: {patience: …} on the validation loss, and evaluation says what to stop or choose by "
                "as well; leave train.early_stopping_patience out"
            )
        return self

    @property
    def technique(self) -> Technique:
        """Which weights are trained, and how; `lora:` is short for `tune: {method: lora}`."""
        return self.tune if self.tune is not None else super().technique

    @model_validator(mode="after")
    def _names_one_technique(self) -> SFTStage:
        if self.tune is not None and self.lora is not None:
            raise ValueError(f"lora is short for `tune: {{method: lora, …}}`, and tune (method: {self.tune.method}) is given too; keep one of them")
        return self


class RewardStage(TRLStage):
    """A reward model (Bradley-Terry) on preference pairs."""

    data: Sources = Field(description="Preference pairs.")
    center_coefficient: float = Field(
        default=0.01, ge=0, description="Weight of (score of chosen + score of rejected)^2, which keeps scores near 0 (arXiv:2312.09244)."
    )
    use_margin: bool = Field(default=True, description="Subtract a pair's `margin`, where it has one, inside the loss.")
    demonstrations: Sources | None = Field(
        default=None, description="Rows whose mean score PPO subtracts; null takes the chosen completions of the training pairs."
    )


class DPOStage(TRLStage):
    """Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290)."""

    data: Sources = Field(description="Preference pairs.")
    reference: str | None = Field(default=None, description="Frozen model that beta ties the policy to; null is init_from.")
    beta: float = Field(default=0.1, gt=0, description="Strength of the tie to the reference, per nat.")
    loss_type: str = Field(default="sigmoid", description="Loss as TRL names it: sigmoid, ipo, hinge, robust, …")
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5, description="Assumed share of flipped labels.")
