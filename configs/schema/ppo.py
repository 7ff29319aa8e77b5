"""Schema of PPO: the rows of the specification's table, each a field."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from configs import presets
from configs.schema.common import Lora, PositiveInt, Sources, StageConfig, Strict
from configs.schema.engines import EngineChoice, RolloutEngine
from configs.schema.guard import Guard
from configs.schema.health import Health
from configs.schema.monitoring import Evaluation, Stopping
from configs.schema.scorers import Scorers


class AdaptiveKL(Strict):
    """Controller of kl_coef (Ziegler et al. 2019, arXiv:1909.08593)."""

    target: float = Field(default=6.0, gt=0, description="KL to the reference summed over a completion, nats.")
    horizon: int = Field(default=10_000, ge=1, description="Samples over which the controller acts.")


class Sampling(Strict):
    """How completions are sampled."""

    max_new_tokens: PositiveInt = Field(default=64, description="Tokens of the longest completion.")
    temperature: float = Field(default=1.0, gt=0, description="Divides the logits when sampling and in every log-prob pass.")
    stop_at_eos: bool = Field(default=True, description="Stop at any EOS id of the model; false samples max_new_tokens always.")
    generate_batch_size: PositiveInt = Field(default=64, description="Prompts of one process per generation batch.")


class PTX(Strict):
    """Imitation of demonstrations beside PPO, so that what they teach is not forgotten (PPO-ptx, Ouyang et al. 2022, arXiv:2203.02155)."""

    data: Sources = Field(description="Demonstrations; their training part is used.")
    coef: float = Field(ge=0, description="Weight of their loss (a mean over completion tokens) beside the policy's; 0 is off.")
    ratio: float = Field(default=1.0, gt=0, description="Demonstrations per completion of an optimizer step.")


class PPOTrain(Strict):
    """How PPO is optimised."""

    iterations: PositiveInt = Field(default=100, description="Rollouts, each followed by its updates.")
    rollout_batch_size: PositiveInt = Field(default=128, description="Completions per iteration, over all processes.")
    num_ppo_epochs: PositiveInt = Field(default=4, description="Passes over a rollout.")
    num_minibatches: PositiveInt = Field(default=1, description="Optimizer steps per pass.")
    micro_batch_size: PositiveInt = Field(default=16, description="Completions of one process per forward pass.")
    learning_rate: float = Field(default=3e-6, gt=0, description="Peak learning rate of the policy.")
    value_learning_rate: float | None = Field(default=None, gt=0, description="Learning rate of the value function; null is learning_rate.")
    schedule: Literal["linear", "cosine", "constant"] = Field(default="linear", description="Decay after the warm-up, by iteration.")
    learning_rate_floor: float = Field(default=0.0, ge=0, le=1, description="Share of the peak that linear and cosine fall to.")
    warmup_iterations: int = Field(default=0, ge=0, description="First iterations, in which the learning rates rise from a tenth of their peaks.")
    adam_beta1: float = Field(default=0.9, ge=0, lt=1, description="Decay of AdamW's mean of gradients, per optimizer step.")
    adam_beta2: float = Field(default=0.999, ge=0, lt=1, description="Decay of AdamW's mean of squared gradients, per optimizer step.")
    adam_epsilon: float = Field(default=1e-5, gt=0, description="Epsilon of AdamW.")
    weight_decay: float = Field(default=0.0, ge=0, description="Decoupled weight decay of AdamW.")
    max_grad_norm: float | None = Field(default=1.0, gt=0, description="Gradients are scaled down to this norm; null leaves them.")
    value_warmup_iterations: int = Field(default=0, ge=0, description="First iterations in which only the value function learns.")
    precision: Literal["auto", "fp32", "bf16"] = Field(default="auto", description="Arithmetic: auto is bf16 on a GPU that has it.")
    gradient_checkpointing: bool = Field(default=False, description="Recompute activations in the backward pass.")
    save_every: PositiveInt = Field(default=10, description="Iterations between resumable saves.")


class PPOStage(StageConfig):
    """Proximal policy optimisation against a scorer, tied to a reference by KL."""

    preset: Literal["nplus", "instructgpt", "openrlhf"] | None = Field(
        default=None, description="A published recipe that sets the fields this config does not; null is our defaults."
    )
    prompts: Sources = Field(description="Prompts that completions are sampled for.")
    reference: str | None = Field(default=None, description="Frozen model of the KL penalty; null is init_from.")
    scorers: Scorers = Field(description="What scores a completion; several are summed by weight. In a chain with a `reward` section: its model.")
    lora: Lora | None = Field(default=None, description="Adapters on one shared backbone; null is full training.")
    quantization: Literal["nf4"] | None = Field(
        default=None, description="nf4: the shared backbone in 4 bits under its adapters (QLoRA; NVIDIA GPU, extra `quantization`); null keeps its weights as they are."
    )
    offload_frozen: bool = Field(
        default=False, description="A reference and reward models that are models of their own stay in main memory and are on the GPU only while they are used: less memory, slower."
    )
    value_function: Literal["auto", "adapter", "copy", "head"] = Field(
        default="auto",
        description="adapter: its own on the shared backbone (needs lora); copy: a full model, from the reward model where it fits; head: on the policy's trunk. "
        "auto: adapter with lora, else copy.",
    )
    value_init: str | None = Field(
        default=None, description="Checkpoint that a value copy starts from; null is the reward model among the scorers, else the policy."
    )
    sampling: Sampling = Field(default_factory=Sampling, description="How completions are sampled.")
    engine: EngineChoice = Field(default_factory=RolloutEngine, description="What samples them in rollouts: native, generate, continuous or vllm, or a mapping. Evaluations are always sampled natively.")
    train: PPOTrain = Field(default_factory=PPOTrain, description="How the policy is optimised.")
    evaluation: Evaluation | None = Field(
        default_factory=Evaluation, description="Evaluation on held-out prompts; the best checkpoint is the one published. Null is off: the last one is."
    )
    stopping: Stopping = Field(default_factory=Stopping, description="What ends a run early, and which checkpoints may be published.")
    kl_coef: float = Field(default=0.05, ge=0, description="Weight of the KL penalty per token, per nat; where an adaptive controller starts.")
    adaptive_kl: AdaptiveKL | None = Field(default=None, description="Adapts kl_coef towards a target KL once per rollout; null keeps it.")
    missing_eos: Literal["replace", "subtract", "scale", "none"] = Field(
        default="replace", description="What happens to the score of a completion that was cut off, after centring."
    )
    missing_eos_penalty: float = Field(default=1.0, ge=0, description="replace: the score becomes minus this; subtract: less this; scale: times this.")
    reward_at: Literal["last_token", "post_eos"] = Field(default="last_token", description="Where the score lands; post_eos is one position later, where max_new_tokens leaves one.")
    center_scores: bool = Field(default=True, description="Subtract the reward model's mean score on the demonstrations.")
    scale_scores: bool = Field(default=False, description="Divide by the standard deviation of those scores too.")
    score_clip: float | None = Field(default=10.0, gt=0, description="Centred scores are clipped at plus or minus this.")
    gamma: float = Field(default=1.0, gt=0, le=1, description="Discount per token.")
    gae_lambda: float = Field(default=0.95, ge=0, le=1, description="Lambda of generalised advantage estimation.")
    bootstrap_cut_off: bool = Field(default=True, description="A completion that was cut off continues at the value of its last position.")
    whiten_advantages: bool = Field(default=True, description="Zero mean and unit variance over real tokens of all processes.")
    whiten_rewards: bool = Field(default=False, description="Unit variance of per-token rewards, mean kept.")
    clip_range: float = Field(default=0.2, gt=0, description="Policy ratio is clipped to 1 - this … 1 + this.")
    clip_range_high: float | None = Field(default=None, gt=0, description="Upper clip where it differs; null is clip_range.")
    dual_clip: float | None = Field(default=None, gt=1, description="Lower bound of the loss at negative advantages, times the advantage; null is off.")
    value_clip_range: float = Field(default=0.2, gt=0, description="Values are clipped to this distance from those of the rollout.")
    vf_coef: float = Field(default=0.1, ge=0, description="Weight of the value loss.")
    health: Health = Field(default_factory=Health, description="Checks of every iteration's metrics and what a failed one does.")
    guard: Guard = Field(default_factory=Guard, description="Optimizer steps that are skipped because their numbers have gone bad.")
    ptx: PTX | None = Field(default=None, description="Demonstrations that are imitated beside PPO; null is none.")
    ema_decay: float | None = Field(
        default=None, gt=0, lt=1, description="Publish an exponential moving average of the policy, decayed so much per optimizer step; null publishes the policy itself."
    )
    towards_start: float | None = Field(
        default=None, gt=0, lt=1,
        description="Publish weights that lie this share of the way back from the policy (or its average) to where it started: KL to the start falls faster than the score. "
        "Evaluations are of what is published; rollouts, and adaptive_kl, see the policy itself. Null publishes it as trained.",
    )  # fmt: skip

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, data: Any) -> Any:
        return presets.filled(data, PPOTrain.model_fields["iterations"].default)[0] if isinstance(data, dict) else data

    @model_validator(mode="after")
    def _stops_by_evaluations(self) -> PPOStage:
        limits = [name for name in ("kl_budget", "patience") if getattr(self.stopping, name) is not None]
        if limits and self.evaluation is None:
            raise ValueError(f"stopping.{limits[0]} is judged at evaluations, and evaluation is null: give an `evaluation:` section, or leave it out")
        return self

    @model_validator(mode="after")
    def _relations(self) -> PPOStage:
        if self.value_function == "adapter" and self.lora is None:
            raise ValueError("value_function: adapter needs a `lora:` section; use copy or head for full training")
        if self.lora is not None and self.value_function in ("copy", "head"):
            raise ValueError(f"value_function: {self.value_function} is for full training; with `lora:` use adapter (or auto)")
        if self.quantization is not None and self.lora is None:
            raise ValueError(f"quantization: {self.quantization} is for a frozen backbone under adapters; add a `lora:` section or leave it out")
        if self.lora is not None and self.lora.dropout:
            raise ValueError(f"lora.dropout is {self.lora.dropout}; PPO recomputes what the rollout stored and needs 0")
        if self.lora is not None:
            self._refuse_variants(self.lora)
        if self.value_init is not None and (self.lora is not None or self.value_function == "head"):
            raise ValueError("value_init is for a value copy (full training, value_function: copy); adapters start from the reward adapter among the scorers, a head at 0: leave it out")
        if self.adaptive_kl is not None and not self.kl_coef:
            raise ValueError("adaptive_kl multiplies kl_coef, and kl_coef is 0: it would stay 0; give kl_coef a value to start from, or leave adaptive_kl out")
        models = [scorer for scorer in self.scorers if scorer.kind in ("model", "ensemble") and scorer.weight]
        if self.scale_scores and len(models) != 1:
            raise ValueError(f"scale_scores divides by the spread of one reward model's scores, and the scorers hold {len(models)} reward models; set it to false")
        if self.train.rollout_batch_size % self.train.num_minibatches:
            raise ValueError(f"train.rollout_batch_size {self.train.rollout_batch_size} is not a multiple of train.num_minibatches {self.train.num_minibatches}")
        if self.train.warmup_iterations >= self.train.iterations:
            raise ValueError(f"train.warmup_iterations {self.train.warmup_iterations} must be below train.iterations {self.train.iterations}, or no iteration has the peak learning rate")
        if self.train.value_warmup_iterations >= self.train.iterations:
            raise ValueError(f"train.value_warmup_iterations {self.train.value_warmup_iterations} must be below train.iterations {self.train.iterations}, or the policy learns in none of them")
        return self

    def _refuse_variants(self, lora: Lora) -> None:
        """Raise for what other stages do with adapters and one shared backbone can't."""
        if lora.changes_base:
            raise ValueError(f"lora.init is {lora.init}, which moves a part of the base into the policy's adapter; in PPO the same base is the reference and carries the other adapters: use default")
        if lora.learning_rate_ratio is not None:
            raise ValueError(f"lora.learning_rate_ratio is {lora.learning_rate_ratio}; PPO trains policy and value adapters at rates of its own (train.learning_rate, train.value_learning_rate): leave it out")
        if lora.quantization is not None:
            raise ValueError("lora.quantization: in PPO the backbone is shared by all models, and its key is `quantization: nf4` of the stage; set that, and leave lora.quantization out")
        if lora.dora and self.train.weight_decay:
            raise ValueError(f"lora.dora with train.weight_decay {self.train.weight_decay}: PPO decays all that it trains, and would draw DoRA's magnitudes to 0 and the model with them; leave one out")
        if lora.dora and self.engine.kind == "vllm":
            raise ValueError("lora.dora: engine vllm is given weights with a plain low-rank update added; use engine: native, or leave dora out")
