"""What of a planned run its time depends on: shapes of models, batches, how state is split."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class ModelShape:
    """A decoder. parameters: all of them. trained: those with gradients (adapters: theirs). lookup: parameters of an input embedding
    that is not tied to the output, which cost memory and no arithmetic. kv_width: numbers that a token leaves in the cache per layer
    (2 × key-value heads × head size; without grouped queries 2 × hidden). vocabulary: 0 for a model with a scalar head.
    """

    parameters: int
    trained: int
    layers: int
    hidden: int
    kv_width: int
    vocabulary: int = 0
    lookup: int = 0

    @property
    def active(self) -> int:
        """Parameters that take part in a matrix product for each token."""
        return self.parameters - self.lookup

    def frozen(self) -> ModelShape:
        """The same model without gradients."""
        return replace(self, trained=0)


@dataclass(frozen=True)
class PlanFacts:
    """One stage of a plan.

    rows: sequences per optimizer step over all devices (a preference pair is two), for PPO completions per iteration. steps: optimizer
    steps, for PPO iterations. tokens: of a sequence on average, for PPO of its prompt; new_tokens: of a completion.
    micro_batch: sequences of one device per forward pass. zero: 0 (DDP), 1, 2 or 3. weight_bytes: of a weight as it is computed with
    and gathered; gradient_bytes: of a gradient as it is sent.

    DPO: reference is the model whose log-probs are computed in every step (None: they were precomputed). PPO: reference, value and
    rewards are the models beside the policy; a backbone that several share is named once for each pass that is made over it. value:
    None for a head on the policy's trunk. epochs and minibatches: passes over a rollout and optimizer steps per pass. generate_batch:
    prompts of one device that are sampled together. gather_once: ZeRO-3 gathers the policy for a whole rollout (False: for every token).
    tensor_parallel: devices that split the policy in sampling. rollout_share: share of the devices that only sample, while the others train
    on the rollout before (0: all do one after the other).
    """

    stage: str
    policy: ModelShape
    rows: int
    steps: int
    tokens: int
    micro_batch: int
    zero: int = 0
    new_tokens: int = 0
    checkpointing: bool = False
    weight_bytes: int = 2
    gradient_bytes: int = 2
    reference: ModelShape | None = None
    value: ModelShape | None = None
    rewards: tuple[ModelShape, ...] = ()
    epochs: int = 1
    minibatches: int = 1
    generate_batch: int = 64
    gather_once: bool = True
    tensor_parallel: int = 1
    rollout_share: float = 0.0

    def __post_init__(self) -> None:
        assert self.stage in ("sft", "reward", "dpo", "ppo"), self.stage
        assert self.zero in (0, 1, 2, 3), self.zero
        assert min(self.rows, self.steps, self.tokens, self.micro_batch, self.epochs, self.minibatches, self.generate_batch, self.tensor_parallel) >= 1
        assert 0 <= self.rollout_share < 1
