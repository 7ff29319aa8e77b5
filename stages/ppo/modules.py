"""The models of PPO: the trained module (policy and value function), the frozen reference, and one shared backbone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from stages.ppo.forward import TokenOutputs, hidden_states, token_outputs
from stages.ppo.gradients import clip_norm, sum_gradients
from stages.ppo.rollout import Tokens
from stages.tuning.quantized import is_quantized

POLICY = "default"  # the adapter name that peft writes to the top of a folder
VALUE, REWARD = "value", "reward"


class Outputs(NamedTuple):
    """What one forward of the trained module gives."""

    logprobs: Tensor  # [B, T]
    values: Tensor  # [B, T + 1]
    entropy: Tensor | None  # [B, T]


def is_of(parameter: str, adapter: str) -> bool:
    """Whether the parameter of this name is the adapter's; a layer of the model may be called "value" too."""
    return re.search(rf"\.lora_\w+\.{adapter}(\.|$)", parameter) is not None


class AdapterSwitch:
    """Chooses which adapter of a shared backbone is on, leaving what is trainable trainable.

    peft couples activity with `requires_grad`: activating one adapter freezes the others. Here policy and value adapter are both
    trained, so only what is active is written, the two attributes in which peft keeps it: its own methods walk through every
    parameter of every layer, which took a tenth of the time of a small model.
    """

    def __init__(self, backbone: nn.Module, trained: list[str]) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer

        self.layers = [module for module in backbone.modules() if isinstance(module, BaseTunerLayer)]
        for layer in self.layers:
            layer.enable_adapters(True)
        self._activate(POLICY)
        for name, parameter in backbone.named_parameters():
            if any(is_of(name, adapter) for adapter in trained):
                parameter.requires_grad_(True)

    def _activate(self, adapter: str | None) -> None:
        for layer in self.layers:
            layer._disable_adapters = adapter is None
            if adapter is not None:
                layer._active_adapter = [adapter]

    @contextmanager
    def on(self, adapter: str | None) -> Iterator[None]:
        """Within the block `adapter` is on, or none is (the bare backbone)."""
        self._activate(adapter)
        try:
            yield
        finally:
            self._activate(POLICY)


class PolicyAndValue(nn.Module):
    """Everything that is trained, as one module, so that one save and one optimizer hold all of it.

    `value_trunk` is a model of its own, or None where the value function reads the policy's trunk: through its own adapter
    when there is an `switch`, else through the policy's hidden states.

    How gradients come about is its own too (`expect`, `backward`, `settle`): here by autograd, summed by us, and through DeepSpeed's
    engines where ZeRO splits what they take (stages/ppo/zero/). The loop of the update is the same for both.
    """

    lockstep = False  # whether every process must make as many passes as every other

    def __init__(
        self, policy: Any, value_trunk: nn.Module | None, value_head: Any, *, temperature: float, switch: AdapterSwitch | None = None
    ) -> None:
        super().__init__()
        self.policy, self.value_trunk, self.value_head = policy, value_trunk, value_head
        self.temperature, self.switch = temperature, switch
        self.output: tuple[Any] = (policy,)  # what knows the policy's output head; in a tuple, lest it become a second child

    @property
    def shares_trunk(self) -> bool:
        """Whether policy and value function are one forward pass."""
        return self.value_trunk is None and self.switch is None

    def forward(self, tokens: Tokens, entropy: bool = False) -> Outputs:
        """Log-probs and values of a batch of prompts and completions."""
        if self.shares_trunk:
            hidden = hidden_states(self.policy.base_model, tokens)
            policy = token_outputs(self.output[0], hidden, tokens, temperature=self.temperature, entropy=entropy)
            return Outputs(policy.logprobs, self._read(hidden), policy.entropy)
        policy = self.logprobs(tokens, entropy)
        with self.value_pass():
            return Outputs(policy.logprobs, self.values(tokens), policy.entropy)

    def logprobs(self, tokens: Tokens, entropy: bool = False) -> TokenOutputs:
        """The policy alone."""
        hidden = hidden_states(self.policy.base_model, tokens)
        return token_outputs(self.output[0], hidden, tokens, temperature=self.temperature, entropy=entropy)

    def imitation(self, tokens: Tokens, counts: Tensor) -> Tensor:
        """Log-probs of the tokens that `counts` [B, T] has True, at temperature 1, [B, T]; no logits are computed for the others."""
        return token_outputs(self.output[0], hidden_states(self.policy.base_model, tokens), replace(tokens, mask=counts), temperature=1.0).logprobs

    @property
    def sampler(self) -> Any:
        """What completions are sampled from, within `for_sampling`: the policy as a transformers model."""
        return self.policy

    def call(self, inputs: dict[str, Any]) -> Any:
        """What the policy returns as a transformers model."""
        return self.policy(**inputs)

    def trunk(self, **inputs: Any) -> Any:
        """The policy's trunk, with whatever adapter is on."""
        return self.policy.base_model(**inputs)

    def value_pass(self) -> AbstractContextManager[None]:
        """The context in which `values` and its backward pass run: the value adapter is on where there is one."""
        return self.switch.on(VALUE) if self.switch is not None else nullcontext()

    def values(self, tokens: Tokens) -> Tensor:
        """The value function alone, [B, T + 1], within `value_pass`."""
        return self._read(hidden_states(self.value_trunk if self.value_trunk is not None else self.policy.base_model, tokens))

    def _read(self, hidden: Tensor) -> Tensor:
        # Never in bf16: values between 4 and 8 would be multiples of 1/32.
        with torch.autocast(hidden.device.type, enabled=False):
            return self.value_head(hidden.to(self.value_head.weight.dtype)).squeeze(-1).float()

    def expect(self, *, policy: int, value: int) -> None:
        """An optimizer step begins, whose gradients come from so many backward passes of the policy's and of the value function's loss."""

    def backward(self, loss: Tensor, of: str) -> None:
        """Add a loss's gradients to those there are; one without a single token has none. `of` is "policy" or "value"; a shared trunk's is both."""
        if loss.requires_grad:
            loss.backward()

    def settle(self, accelerator: Any, limit: float | None, *, policy_learns: bool) -> dict[str, Tensor]:
        """Sum the gradients of all processes, clip the norms of the policy's and of the value function's, each for itself, and return them, [].

        Apart, because the value loss has another scale: in a common norm a surprised value function would stall the policy.
        """
        if not policy_learns:
            for parameter in self.policy_parameters():
                parameter.grad = None
        sum_gradients(self.parameters(), accelerator)
        return {"policy/grad_norm": clip_norm(self.policy_parameters(), limit), "value/grad_norm": clip_norm(self.value_parameters(), limit)}

    def for_sampling(self) -> AbstractContextManager[Any]:
        """The context in which `sampler` can be called token by token."""
        return nullcontext()

    def state_to_publish(self, published: Any, *, adapter: bool) -> dict[str, Tensor] | None:
        """What `save_pretrained` of the published model must be given beside it: nothing where every process holds all of it."""

    def policy_parameters(self) -> list[nn.Parameter]:
        """Trained parameters of the policy (and of the value function where they are the same)."""
        value = {id(p) for p in self.value_parameters()}
        return [p for p in self.parameters() if p.requires_grad and id(p) not in value]

    def value_parameters(self) -> list[nn.Parameter]:
        """Trained parameters of the value function alone."""
        named = [p for n, p in self.named_parameters() if n.startswith(("value_trunk.", "value_head.")) or is_of(n, VALUE)]
        return [p for p in named if p.requires_grad]


def store_linear_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Keep the weights of linear layers in `dtype`; embeddings, norms, adapters, a score head and quantised layers stay as they are.

    Under autocast to `dtype` the model then computes what it would with all weights in float32, in about half the memory. Stored
    wholly in bf16 it would round embeddings and the residual stream, and show a KL to the policy it is a copy of.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for name, module in model.named_modules():
        kept = ".lora_" in name or name == "score"
        if isinstance(module, nn.Linear) and not kept and not is_quantized(module) and id(module.weight) not in embeddings:
            module.to(dtype)


class Reference:
    """The frozen model that KL is measured to: a model of its own, or the backbone with its adapters off."""

    def __init__(self, model: Any, *, temperature: float, switch: AdapterSwitch | None = None) -> None:
        self.model, self.temperature, self.switch = model, temperature, switch

    def at_hand(self) -> AbstractContextManager[None]:
        """The context in which `logprobs` runs; here it is always at hand."""
        return nullcontext()

    @torch.no_grad()
    def logprobs(self, tokens: Tokens) -> Tensor:
        """Log-probs of the sampled tokens under the reference, [B, T], nats."""
        if self.switch is None:
            return self._outputs(tokens).logprobs
        with self.switch.on(None):
            return self._outputs(tokens).logprobs

    def _outputs(self, tokens: Tokens) -> TokenOutputs:
        hidden = hidden_states(self.model.base_model, tokens)
        return token_outputs(self.model, hidden, tokens, temperature=self.temperature)
