"""Whether PPO can work with an architecture, found out on short rows before hours of training would show it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from configs.errors import UserError
from configs.schema import Sampling
from stages.loss.head import output_logits
from stages.ppo.forward import hidden_states, token_outputs
from stages.ppo.rollout import Tokens
from stages.ppo.sampling import completion_seed, left_pad, sample

ROWS = [[3, 1, 4, 1, 5, 9, 2, 6], [5, 3]]  # ids, taken modulo the vocabulary
TOLERANCE = 1e-3  # of the largest logit
FLAT = 100.0  # a temperature at which two rows sample different tokens whatever the model has learned


def prove(model: Any) -> None:
    """Compare our forward passes and samples with the model's own logits, one unpadded row at a time.

    Raises:
        UserError: the model does something to its logits that we don't know, reads padding, or can't sample rows of different lengths.
    """
    prove_head(model)
    prove_padding(model)
    prove_sampling(model)


@torch.no_grad()
def prove_head(model: Any) -> None:
    """Logits computed from hidden states are the model's own."""
    row = short_rows(model)[0]
    expected = _own_logits(model, row)
    found = output_logits(model, model.base_model(input_ids=_tensor(model, row), use_cache=False).last_hidden_state)[0]
    _refuse(model, "logits computed from its hidden states differ from its own", expected, found)


@torch.no_grad()
def prove_padding(model: Any) -> None:
    """A row with padding after it has the logits that it has alone; padding before it is proved with sampling."""
    rows = short_rows(model)
    device = next(model.parameters()).device
    ids, mask = left_pad([row[:-1] for row in rows], 0, device)
    last, real = torch.tensor([[row[-1]] for row in rows], device=device), torch.ones(len(rows), 1, dtype=torch.bool, device=device)
    found = output_logits(model, hidden_states(model.base_model, Tokens(ids, mask, last, real)))
    for index, row in enumerate(rows):
        _refuse(model, "a row with padding after it has other logits than alone", _own_logits(model, row)[-2:], found[index])


@torch.no_grad()
def prove_sampling(model: Any) -> None:
    """Rows that are sampled together, of which one ends first, have the log-probs of a forward pass."""
    device, size = next(model.parameters()).device, model.config.get_text_config().vocab_size
    rows, seeds = short_rows(model), [completion_seed(0, 0, 0), completion_seed(0, 0, 1)]
    try:
        free = _sample(model, rows, seeds, [])
        ended = _sample(model, rows, seeds, free[0].completion_ids[:1])
    except Exception as error:
        raise UserError(f"{type(model).__name__} can't sample rows of different lengths together ({type(error).__name__}: {error}); PPO does not support this architecture") from error
    for row, completion in zip(rows, ended, strict=True):
        ids = torch.tensor([completion.completion_ids])
        tokens = Tokens(*left_pad([row], 0, device), ids.to(device), torch.ones_like(ids, dtype=torch.bool, device=device))
        expected = token_outputs(model, hidden_states(model.base_model, tokens), tokens, temperature=FLAT).logprobs[0]
        # Times the temperature, less what a uniform distribution has: of the size of logits, as the tolerance is.
        one, other = ((x.double() + math.log(size)) * FLAT for x in (expected, torch.tensor(completion.logprobs, device=device)))
        _refuse(model, "what it samples has other log-probs than a forward pass gives", one, other)


def _sample(model: Any, rows: list[list[int]], seeds: list[int], eos_ids: list[int]) -> Any:
    settings = Sampling(max_new_tokens=4, temperature=FLAT, generate_batch_size=2)
    return sample(model, rows, sampling=settings, eos_ids=eos_ids, pad_id=0, seeds=seeds)


def short_rows(model: Any) -> list[list[int]]:
    """Two short prompts of different length, ids within the model's vocabulary."""
    size = model.config.get_text_config().vocab_size
    return [[token % size for token in row] for row in ROWS]


def _tensor(model: Any, row: list[int]) -> Tensor:
    return torch.tensor([row], device=next(model.parameters()).device)


def _own_logits(model: Any, row: list[int]) -> Tensor:
    """The model's own logits of one row without padding, [L, V]."""
    return model(input_ids=_tensor(model, row), use_cache=False).logits[0]


def _refuse(model: Any, what: str, expected: Tensor, found: Tensor) -> None:
    gap = (expected - found).abs().max().item()
    if not gap <= TOLERANCE * max(1.0, expected.abs().max().item()):
        raise UserError(f"{type(model).__name__}: {what} by {gap:.3g}; PPO does not support this architecture")
