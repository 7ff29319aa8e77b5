"""A soft prompt at the trunk of a model: whoever calls the trunk passes text and gets the hidden states of that text, nothing more.

Prompt tuning (Lester et al. 2021, arXiv:2104.08691) and P-tuning (Liu et al. 2021, arXiv:2103.10385) put n vectors before the embeddings of the
text; prefix tuning (Li and Liang 2021, arXiv:2101.00190) puts n keys and values before those of each layer. Both shift the text by n positions.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from configs.errors import UserError

NAME = "soft_prompt"  # of the module at the trunk


@dataclass(frozen=True)
class Shape:
    """What a prompt's numbers mean. n virtual tokens; of a prefix also the layers, key-value heads and width of each head."""

    method: str  # prompt_tuning, p_tuning or prefix_tuning
    length: int
    width: int  # of a virtual token: the embeddings', or heads * head_width
    layers: int = 0
    heads: int = 0

    @property
    def is_prefix(self) -> bool:
        """Whether the prompt is keys and values rather than embeddings."""
        return self.method == "prefix_tuning"

    @property
    def columns(self) -> int:
        """Numbers of one virtual token."""
        return 2 * self.layers * self.width if self.is_prefix else self.width


class SoftPrompt(nn.Module):
    """The hooks of a prompt and its numbers [n, columns]: a buffer that no state dict holds, or (in training) what `encode` gives at every call.

    At the first call of a sequence (no cache, or an empty one) the prompt is put in; with a cache that holds it, mask and positions are shifted.
    Padding on the left is exact where the caller gives position ids that leave it out, as every caller of ours does.
    """

    vectors: Tensor | None
    settings: dict[str, Any]  # adapter_config.json of the folder that a frozen prompt came from

    def __init__(self, shape: Shape, vectors: Tensor | None = None, encode: Callable[[], Tensor] | None = None) -> None:
        super().__init__()
        assert (vectors is None) != (encode is None)
        self.shape, self.encode = shape, encode
        self.register_buffer("vectors", vectors, persistent=False)  # weights are saved without it: it has a folder of its own
        self.settings = {}
        self.hooks: tuple[Any, ...] = ()  # at the trunk
        self.enabled = True
        self._put_in = 0  # positions to cut from what the trunk is about to return
        self._own_cache = False

    def numbers(self) -> Tensor:
        """[n, columns], in their own precision whatever autocast says: what is published is what was trained with."""
        if self.encode is None:
            assert self.vectors is not None
            return self.vectors
        with torch.autocast("cuda" if torch.cuda.is_available() else "cpu", enabled=False):
            return self.encode()

    def before(self, trunk: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """The trunk's arguments with the prompt in front. Forward pre-hook of the trunk."""
        self._put_in, self._own_cache = 0, False
        if not self.enabled:
            return None
        given = dict(inspect.signature(trunk.forward).bind_partial(*args).arguments) | kwargs if args else dict(kwargs)
        text = given["inputs_embeds"] if given.get("input_ids") is None else given["input_ids"]
        self._shift(given, text)
        cache = given.get("past_key_values")
        if cache is None or not cache.get_seq_length():
            (self._put_prefix if self.shape.is_prefix else self._put_embeddings)(trunk, given, text)
        return (), given

    def _shift(self, given: dict[str, Any], text: Tensor) -> None:
        """Mask and positions of the text, behind those of the prompt."""
        mask, cache = given.get("attention_mask"), given.get("past_key_values")
        if (mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2)) or getattr(cache, "is_compileable", False):
            raise UserError(
                f"a model with a soft prompt ({self.shape.method}) was called with a mask or a static cache made beforehand, in which there is no place for "
                "the prompt; use a cache that grows (engine.kind native, static_cache: false)"
            )
        if mask is not None:
            given["attention_mask"] = torch.cat([mask.new_ones(len(text), self.shape.length), mask], dim=1)
        if given.get("position_ids") is not None:
            given["position_ids"] = given["position_ids"] + self.shape.length

    def _put_embeddings(self, trunk: Any, given: dict[str, Any], text: Tensor) -> None:
        embeddings = given.get("inputs_embeds")
        if embeddings is None:
            embeddings = trunk.get_input_embeddings()(text)
        prompt = self.numbers().to(embeddings.device, embeddings.dtype).expand(len(text), -1, -1)
        given["input_ids"], given["inputs_embeds"] = None, torch.cat([prompt, embeddings], dim=1)
        if given.get("position_ids") is not None:
            ahead = torch.arange(self.shape.length, device=text.device).expand(*given["position_ids"].shape[:-1], -1)
            given["position_ids"] = torch.cat([ahead, given["position_ids"]], dim=-1)
        self._put_in = self.shape.length

    def _put_prefix(self, trunk: Any, given: dict[str, Any], text: Tensor) -> None:
        refuse_checkpointing(trunk, self.shape)
        if given.get("past_key_values") is None:
            from transformers import DynamicCache

            given["past_key_values"], self._own_cache = DynamicCache(config=trunk.config), not given.get("use_cache")
        shape = self.shape
        parts = self.numbers().to(text.device, trunk.get_input_embeddings().weight.dtype).view(shape.length, 2 * shape.layers, shape.heads, -1)
        parts = parts.permute(1, 2, 0, 3)  # [2 * layers, heads, n, head width]: keys and values take turns
        for layer in range(shape.layers):
            keys, values = (part.expand(len(text), -1, -1, -1) for part in parts[2 * layer : 2 * layer + 2])
            given["past_key_values"].update(keys, values, layer)

    def after(self, trunk: Any, args: tuple[Any, ...], output: Any) -> Any:
        """The trunk's output at the positions of the text. Forward hook of the trunk."""
        if self._own_cache:
            output.past_key_values = None
        if self._put_in:
            output.last_hidden_state = output.last_hidden_state[:, self._put_in :]
            if output.get("hidden_states") is not None:
                output.hidden_states = tuple(states[:, self._put_in :] for states in output.hidden_states)
        return output

    @contextmanager
    def off(self) -> Iterator[None]:
        """Within the block the model is what it would be without its prompt."""
        was, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = was


def put_at(model: Any, prompt: SoftPrompt) -> None:
    """Put a prompt at the trunk of a model (a causal one or a sequence classifier); the trunk may change its head, the prompt stays.

    Raises:
        UserError: there is one already.
    """
    if of(model) is not None:
        raise UserError("this model has a soft prompt already, and two can't be stacked; start from the model under it, or train with method full or lora")
    trunk = model.base_model
    trunk.add_module(NAME, prompt)
    prompt.hooks = (trunk.register_forward_pre_hook(prompt.before, with_kwargs=True), trunk.register_forward_hook(prompt.after))


def take_off(model: Any) -> SoftPrompt | None:
    """Take the prompt of a model away, which is then what lies under it; the prompt can be put back with `put_at`. None where there was none."""
    prompt = of(model)
    if prompt is not None:
        for hook in prompt.hooks:
            hook.remove()
        prompt.hooks = ()
        delattr(model.base_model, NAME)
    return prompt


def of(model: Any) -> SoftPrompt | None:
    """The prompt of a model, of one with adapters too; None where it has none."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return getattr(getattr(inner, "base_model", inner), NAME, None)


def room(model: Any) -> int | None:
    """Positions that a model has for text: all of its own but those that its prompt takes; None where its config names no limit."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    positions, prompt = getattr(config, "max_position_embeddings", None), of(model)
    return positions if positions is None or prompt is None else positions - prompt.shape.length


def refuse_checkpointing(trunk: Any, shape: Shape) -> None:
    """Raise where layers would be computed again without the cache that a prefix lies in."""
    if shape.is_prefix and trunk.training and any(getattr(module, "gradient_checkpointing", False) for module in trunk.modules()):
        raise UserError(
            "train.gradient_checkpointing with prefix tuning: layers that are computed again in the backward pass drop the cache that the prefix lies in; "
            "set it to false, or use prompt_tuning or p_tuning"
        )
