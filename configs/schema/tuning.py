"""The `tune:` section of an SFT config: which weights are trained, and how. One class per technique."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from configs.schema.common import Fraction, Lora, PositiveInt, Strict

NOT_IN_PEFT = ("bottleneck", "houlsby", "pfeiffer")


class Freeze(Strict):
    """Parts of a model that full training leaves as they are, bit for bit."""

    first: PositiveInt | None = Field(default=None, description="Freeze the first so many decoder layers.")
    keep_last: PositiveInt | None = Field(default=None, description="Freeze all decoder layers but the last so many.")
    patterns: list[str] = Field(
        default_factory=list, description="Freeze parameters in whose names one of these regular expressions is found, such as ['mlp', 'layers.0.'] (align sft says which)."
    )
    embeddings: bool = Field(default=False, description="Freeze token and position embeddings, and with them an output head that shares their weight.")
    norms: bool = Field(default=False, description="Freeze the normalisation layers.")
    unfreeze_every: PositiveInt | None = Field(
        default=None,
        description="Optimizer steps after which the highest decoder layer that `first` or `keep_last` froze is trained too, and again the next one below (gradual unfreezing, "
        "arXiv:1801.06146): for small data, against forgetting. Null: never.",
    )

    @field_validator("patterns")
    @classmethod
    def _are_expressions(cls, patterns: list[str]) -> list[str]:
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
        return patterns

    @model_validator(mode="after")
    def _says_which_layers_once(self) -> Freeze:
        if self.first is not None and self.keep_last is not None:
            raise ValueError("first and keep_last say the same thing in two ways; give one of them")
        if self.unfreeze_every is not None and self.first is None and self.keep_last is None:
            raise ValueError("unfreeze_every thaws the layers that `first` or `keep_last` froze, and neither is given")
        return self


class Full(Strict):
    """All weights, but for what `freeze` leaves out."""

    method: Literal["full"] = Field(
        default="full",
        description="Trains all weights: the best result where memory (16 bytes a weight) and data allow; with `freeze`, parts of them: cheaper, and less is forgotten.",
    )
    freeze: Freeze | None = Field(default=None, description="Parts that are left as they are; null trains everything.")


class LoraTuning(Lora):
    """Low-rank adapters; `lora:` is short for this."""

    method: Literal["lora"] = Field(default="lora", description="Low-rank adapters on a frozen base: the default choice on one GPU; close to full training, mergeable, megabytes to keep.")


class QLoraTuning(Lora):
    """Low-rank adapters on a base in 4 bits."""

    method: Literal["qlora"] = Field(default="qlora", description="LoRA on a base in 4 bits: where the base does not fit otherwise; slower, and a little worse. NVIDIA GPU only.")
    quantization: Literal["nf4"] = Field(default="nf4", description="How the frozen linear layers are kept: NF4 (arXiv:2305.14314).")


class IA3(Strict):
    """One factor per channel (Liu et al. 2022, arXiv:2205.05638)."""

    method: Literal["ia3"] = Field(
        default="ia3", description="Scales keys, values and MLP activations by trained factors: for tens to hundreds of rows and very many small adapters; wants a high learning rate (3e-3)."
    )
    target_modules: list[str] | None = Field(default=None, description="Linear layers that are scaled; null is peft's choice for the architecture.")
    feedforward_modules: list[str] | None = Field(
        default=None, description="Those of target_modules whose input is scaled instead of their output (the MLP's last layer); null is peft's choice."
    )

    @model_validator(mode="after")
    def _names_both(self) -> IA3:
        if (self.target_modules is None) != (self.feedforward_modules is None):
            raise ValueError("target_modules and feedforward_modules go together: give both (an empty list of feedforward_modules scales outputs only), or neither")
        if not set(self.feedforward_modules or ()) <= set(self.target_modules or ()):
            raise ValueError(f"feedforward_modules {self.feedforward_modules} must be among target_modules {self.target_modules}")
        return self


class Soft(Strict):
    """What prompt-, prefix- and P-tuning share: the model is frozen, and vectors before the text are trained."""

    virtual_tokens: PositiveInt = Field(default=20, description="Tokens that the trained vectors take the place of; they count against the model's positions.")


class PromptTuning(Soft):
    """Trained embeddings before the text (Lester et al. 2021, arXiv:2104.08691)."""

    method: Literal["prompt_tuning"] = Field(
        default="prompt_tuning",
        description="Trains embeddings before the text: kilobytes for a task, one frozen model for all of them; wants a large model (billions of weights) and a high learning rate.",
    )
    init_text: str | None = Field(default=None, description="Text whose embeddings the vectors start as, such as the task in words; null draws them.")


class PrefixTuning(Soft):
    """Trained keys and values in every layer (Li and Liang 2021, arXiv:2101.00190)."""

    method: Literal["prefix_tuning"] = Field(
        default="prefix_tuning", description="Trains keys and values before the text in every layer: stronger than prompt_tuning on small models, with less room to train badly."
    )
    prefix_projection: bool = Field(default=False, description="Train the keys and values through a small network, which is dropped afterwards: steadier, more memory in training.")
    encoder_hidden_size: PositiveInt | None = Field(default=None, description="Width of that network; null is the model's.")

    @model_validator(mode="after")
    def _sizes_what_there_is(self) -> PrefixTuning:
        if self.encoder_hidden_size is not None and not self.prefix_projection:
            raise ValueError("encoder_hidden_size is that of the network that prefix_projection: true trains through; set it, or leave encoder_hidden_size out")
        return self


class PTuning(Soft):
    """Embeddings before the text that a small network produces (Liu et al. 2021, arXiv:2103.10385)."""

    method: Literal["p_tuning"] = Field(default="p_tuning", description="prompt_tuning through a small network, which is dropped afterwards: easier to train than prompt_tuning.")
    encoder: Literal["mlp", "lstm"] = Field(default="mlp", description="The network that produces the embeddings.")
    encoder_hidden_size: PositiveInt | None = Field(default=None, description="Width of that network; null is the model's.")
    encoder_layers: PositiveInt = Field(default=2, description="Layers of an lstm; an mlp has two.")
    encoder_dropout: Fraction = Field(default=0.0, description="Dropout between the layers of an lstm.")


Technique = Full | LoraTuning | QLoraTuning | IA3 | PromptTuning | PrefixTuning | PTuning


def _as_technique(value: Any) -> Any:
    """Accept the name of a technique where its section is meant; say of those that peft does not have that it has not."""
    found = {"method": value} if isinstance(value, str) else value
    if isinstance(found, dict) and (name := str(found.get("method")).lower()) in NOT_IN_PEFT:
        raise ValueError(
            f"method {name}: bottleneck adapters (Houlsby, Pfeiffer: small layers in series after attention and MLP) are not in peft (0.21.2; its adaption_prompt, shadow and "
            "peanut are other methods), and so not here; use lora with the bottleneck's width as rank, or ia3"
        )
    return found


Tune = Annotated[
    Annotated[Technique, Field(discriminator="method")],
    BeforeValidator(_as_technique, json_schema_input_type=str | Annotated[Technique, Field(discriminator="method")]),
]


def technique_of(cfg: Any) -> Any:
    """The technique of any stage's config: a Technique, or PPO's Lora."""
    return getattr(cfg, "technique", None) or cfg.lora or Full()


def lora_of(cfg: Any) -> Lora | None:
    """The LoRA settings of a stage's config, SFT's and PPO's too; None where it trains otherwise."""
    technique = technique_of(cfg)
    return technique if isinstance(technique, Lora) else None


def freezes_base(cfg: Any) -> bool:
    """Whether a stage's base stays as it is while a few parameters beside it are trained: with those switched off, the model is its parent."""
    technique = technique_of(cfg)
    return not (isinstance(technique, Full) or (isinstance(technique, Lora) and technique.changes_base))
