"""What a simulation of a stage needs to know: the shapes of its models and batches, taken from the stage's config."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from configs.schema import Lora

SCORES = {"sft": 1, "reward": 2, "dpo": 2, "ppo": 1}  # rows of a micro-batch per row of `micro_batch_size`: pairs are two


@dataclass(frozen=True)
class Job:
    """One stage on one process, as far as memory depends on it."""

    stage: str  # sft, reward, dpo, ppo
    config: Any  # the transformers config of the policy
    micro_batch: int  # rows or pairs per forward pass of a process
    accumulation: int  # micro-batches per optimizer step of a process
    row_tokens: int  # tokens of the longest row
    prompt_tokens: int = 0  # tokens of the longest prompt; PPO
    completion_tokens: int = 0  # tokens of the longest completion; PPO, and SFT where it is known
    generate_batch: int = 0  # prompts generated at once by a process; PPO
    demonstrations: int = 0  # rows that are imitated beside an optimizer step, of one process; PPO with `ptx`
    demonstration_tokens: int = 0  # tokens of the longest of them
    demonstration_counted: int = 0  # most tokens of one that the loss covers
    rollout_rows: int = 0  # completions of an iteration, all processes; PPO
    evaluates: bool = False  # PPO: samples held-out prompts before it trains
    lora: Lora | None = None
    bf16: bool = False  # arithmetic in bf16; else float32
    pure_bf16: bool = False  # weights and gradients in bf16 too, as DeepSpeed has them, but for PPO's; else bf16 is an autocast over float32 weights
    checkpointing: bool = False
    attn_implementation: str | None = None
    loss_chunk: int | str | None = "auto"  # SFT: tokens whose logits are alive at once; None is TRL's own loss
    optimizer: str = "adamw"
    value_function: str = "copy"  # PPO: adapter, copy or head
    own_reference: bool = True  # DPO and PPO: a reference that is a model of its own
    reward_models: tuple[Any, ...] = ()  # PPO: configs of the reward models that are models of their own
    reward_adapters: tuple[Lora, ...] = ()  # PPO: reward models that are adapters on the shared backbone; the value adapter starts as a copy of the first
    heldout_models: tuple[Any, ...] = ()  # PPO: the same of the scorers that evaluations alone use
    heldout_adapters: tuple[Lora, ...] = ()
    offload_frozen: bool = False
    quantized: bool = False  # PPO: the shared backbone in 4 bits
    ema: bool = False  # PPO: a running average of the policy
    towards_start: bool = False  # PPO: the policy's first weights, in main memory
    gathers_once: bool = False  # PPO: weights that are split are whole for a rollout; else each layer's while it computes
    gpu: bool = True  # kernels of a GPU: fused ones keep less than their equivalents on a CPU
    vocabulary: int | None = None  # tokens of the tokenizer, where it is larger than the config's

    @property
    def sequences(self) -> int:
        """Rows of one forward pass in training."""
        return self.micro_batch * SCORES[self.stage]

    @property
    def keeps_gathered(self) -> bool:
        """Whether DeepSpeed keeps split weights whole from one use to the next, while they fit: it must have seen the order of uses.

        PPO tells it not to. DPO whose reference is its policy without adapters goes through the model twice before the backward pass: DeepSpeed
        takes each forward pass for a step of its own (`reset_step` of partitioned_param_coordinator.py, 0.19.8), finds another order in each
        and forgets what it has seen.
        """
        return self.stage != "ppo" and (self.stage != "dpo" or self.own_reference)

    @property
    def layers(self) -> int:
        """Decoder layers of the policy."""
        return int(self.config.get_text_config().num_hidden_layers)

    def with_layers(self, layers: int) -> Job:
        """The same job with models of `layers` layers."""
        rewards, heldout = (tuple(shortened(c, layers) for c in found) for found in (self.reward_models, self.heldout_models))
        return replace(self, config=shortened(self.config, layers), reward_models=rewards, heldout_models=heldout)


def shortened(config: Any, layers: int) -> Any:
    """A copy of a transformers config with so many decoder layers: the first ones, where they are of several kinds."""
    values = config.to_dict()
    text = values.get("text_config", values)
    text["num_hidden_layers"] = layers
    for key, value in text.items():
        if key.endswith(("layer_types", "layers_block_type", "mlp_layer_types")) and isinstance(value, list):
            text[key] = value[:layers]
    return type(config).from_dict(values)
