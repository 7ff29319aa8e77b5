"""The models of PPO: the trained module (policy and value function), the frozen reference, and one shared backbone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from stages.ppo.forward import TokenOutputs, hidden_states, token_outputs
from stages.ppo.quantized import is_quantized
from stages.ppo.rollout import Tokens

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
    """

    def __init__(
        self, policy: Any, value_trunk: nn.Module | None, value_head: nn.Linear, *, temperature: float, switch: AdapterSwitch | None = None
    ) -> None:
        super().__init__()
        self.policy, self.value_trunk, self.value_head = policy, value_trunk, value_head
        self.temperature, self.switch = temperature, switch

    @property
    def shares_trunk(self) -> bool:
        """Whether policy and value function are one forward pass."""
        return self.value_trunk is None and self.switch is None

    def forward(self, tokens: Tokens, entropy: bool = False) -> Outputs:
        """Log-probs and values of a batch of prompts and completions."""
        if self.shares_trunk:
            hidden = hidden_states(self.policy.base_model, tokens)
            policy = token_outputs(self.policy, hidden, tokens, temperature=self.temperature, entropy=entropy)
            return Outputs(policy.logprobs, self._read(hidden), policy.entropy)
        policy = self.logprobs(tokens, entropy)
        with self.value_pass():
            return Outputs(policy.logprobs, self.values(tokens), policy.entropy)

    def logprobs(self, tokens: Tokens, entropy: bool = False) -> TokenOutputs:
        """The policy alone."""
        hidden = hidden_states(self.policy.base_model, tokens)
        return token_outputs(self.policy, hidden, tokens, temperature=self.temperature, entropy=entropy)

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
