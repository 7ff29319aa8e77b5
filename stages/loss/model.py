"""Gives a causal language model a forward pass that ends in sums over labelled tokens, and proves on a row that they are its own."""

from __future__ import annotations

import functools
import math
import types
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stages.attention import computed_anywhere
from stages.loss.head import logits_cap, logits_scale, output_logits, plain, text_config
from stages.loss.sums import TokenSums, Weighting, linear_sums, module_sums, rows_of_chunk, whole_sums
from stages.zero import gather

LARGE = 300.0  # the largest logit once hidden states are made larger: a cap or a scale that is missed shows there, whatever the logits are
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}  # of a sum of losses, relative; else of 2 %
SHOWN_TOKENS = 32


def add_token_sums(model: Any, chunk: int | None) -> None:
    """Let `model(..., labels=labels, token_sums=True[, label_smoothing=s][, token_weights=w, marks=m])` return TokenSums of the labels [B, T] that are not -100.

    w [B, T] float: what a label's loss is multiplied by; m [B, T] bool: labels that have sums of their own as well. Each label is predicted by the position before it. Only hidden states of positions that count reach the output head, `chunk` tokens
    at a time (None: as many as suit the vocabulary). Under PEFT, DDP or DeepSpeed the wrapped model takes the same arguments.
    """
    model.forward = types.MethodType(_forward(model.forward, type(model), functools.partial(_sums, chunk)), model)


def add_whole_sums(model: Any) -> None:
    """The same for a model whose logits are not what its head makes of its trunk's hidden states: from its own logits, all of them."""
    own = model.forward

    def sums(model: Any, args: Any, kwargs: Any, asked: Asked) -> TokenSums:
        logits = own(*args, **kwargs).logits[:, :-1]
        return whole_sums(logits[asked.counted], asked.ids, asked.smoothing, asked.weighting)

    model.forward = types.MethodType(_forward(own, type(model), sums), model)


class Asked(NamedTuple):
    """What sums are of, at the positions before the labels."""

    counted: Tensor  # [B, T - 1] bool
    ids: Tensor  # [N]: labels that count
    smoothing: float
    weighting: Weighting | None


def _asked(labels: Tensor, smoothing: float, weights: Tensor | None, marks: Tensor | None) -> Asked:
    counted = labels[:, 1:] != -100
    weighting = None if weights is None or marks is None else Weighting(weights[:, 1:][counted], marks[:, 1:][counted])
    return Asked(counted, labels[:, 1:][counted], smoothing, weighting)


def _forward(own: Any, kind: Any, sums: Any) -> Any:
    """A forward method: `own`, unless it is asked for sums. Its signature stays, which generation checks its arguments against."""

    @functools.wraps(kind.forward)
    def forward(
        self: Any, *args: Any, token_sums: bool = False, label_smoothing: float = 0.0, token_weights: Tensor | None = None, marks: Tensor | None = None, **kwargs: Any
    ) -> Any:
        if not token_sums:
            return own(*args, **kwargs)
        labels = kwargs.pop("labels")
        kwargs["use_cache"] = False  # which some attention kernels take for a reason to look across rows in one sequence
        return sums(self, args, kwargs, _asked(labels, label_smoothing, token_weights, marks))

    return forward


def _sums(chunk: int | None, model: Any, args: Any, kwargs: Any, asked: Asked) -> TokenSums:
    states = model.base_model(*args, **kwargs).last_hidden_state[:, :-1][asked.counted]
    ids, smoothing, weighting = asked.ids, asked.smoothing, asked.weighting
    head = model.get_output_embeddings()
    linear = plain(head)
    if linear is not None:
        with gather.whole(linear.parameters()):
            return linear_sums(states, ids, linear, scale=logits_scale(model), cap=logits_cap(model), rows=chunk, smoothing=smoothing, weighting=weighting)
    trained = [parameter for parameter in head.parameters() if parameter.requires_grad]
    rows = chunk or rows_of_chunk(text_config(model).vocab_size, states.device)
    return module_sums(states, ids, functools.partial(output_logits, model), trained, rows=rows, smoothing=smoothing, weighting=weighting)


@torch.no_grad()
def difference(model: Any, ids: Sequence[int]) -> float:
    """How far the sums of a model with `add_token_sums` are from those of its own logits on one row: relative, at most.

    A collective under ZeRO-3. The model is taken as it is and with hidden states that are many times larger, so that logits are where
    scales and caps do their work.
    """
    row = torch.tensor([ids[:SHOWN_TOKENS]], device=next(model.parameters()).device)
    was_training = model.training
    model.eval()
    found, largest = _compare(model, row, 1.0)
    amplified, _ = _compare(model, row, max(1.0, LARGE / max(largest, 1e-6)))
    model.train(was_training)
    return max(found, amplified) if math.isfinite(found + amplified) else math.inf


def _compare(model: Any, row: Tensor, factor: float) -> tuple[float, float]:
    """(largest relative difference of sums, largest logit) with the trunk's hidden states times `factor`."""
    handle = model.base_model.register_forward_hook(functools.partial(_amplify, factor))
    try:
        with gather.forward_possible(model):
            logits = model(input_ids=row, use_cache=False).logits[0, :-1]
            ours = model(input_ids=row, labels=row, token_sums=True)
    finally:
        handle.remove()
    whole = whole_sums(logits, row[0, 1:])
    gaps = torch.stack([(a - b).abs() / b.abs().clamp(min=1) for a, b in ((ours.loss, whole.loss), (ours.entropy, whole.entropy))])
    return gaps.max().item(), logits.abs().max().item()


def _amplify(factor: float, trunk: Any, args: Any, output: Any) -> Any:
    output.last_hidden_state = output.last_hidden_state * factor
    return output


def prove(model: Any, ids: Sequence[int]) -> str | None:
    """Why a model's loss can't be computed in chunks, or None where it is shown that it can."""
    if model.get_output_embeddings() is None or model.base_model is model:
        return "it names no output head"
    try:
        with computed_anywhere(model):  # on a GPU it comes later, and what is proven does not depend on the kernel
            gap = difference(model, ids)
    except (AttributeError, TypeError, RuntimeError, ValueError) as error:
        return f"its trunk and its head do not work apart ({type(error).__name__}: {str(error).splitlines()[0][:120]})"
    tolerance = TOLERANCE.get(next(model.parameters()).dtype, 2e-2)
    return None if gap <= tolerance else f"what its head makes of its hidden states is not its logits (loss differs by {gap:.1e})"
