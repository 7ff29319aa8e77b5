"""Log-probs of given tokens under a model: for KL to a reference and for perplexity on plain text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from configs.errors import UserError
from stages import soft
from stages.evaluation.statistics import perplexity, windows
from stages.ppo.forward import hidden_states, token_outputs
from stages.ppo.rollout import padded

WINDOW = 512  # tokens read at once, where the model reads that many
TEXT_TOKENS = 20_000  # of a plain text file; the standard error of log-perplexity is then about 0.02
SEPARATOR = "<|endoftext|>"
Ids = Sequence[Sequence[int]]


@torch.no_grad()
def completion_logprobs(
    model: Any, prompt_ids: Ids, completion_ids: Ids, *, temperature: float, pad_id: int, batch_size: int = 16
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """Log-probs (nats, at the given temperature) of the tokens of each completion: ([N, T], mask [N, T] True on real tokens).

    Prompts hold at least one token. Logits are computed for completion positions only, in chunks.
    """
    assert all(prompt_ids), "a completion without any token before it has no log-prob"
    width = max((len(ids) for ids in completion_ids), default=0)
    logprobs, mask = np.zeros((len(completion_ids), width)), np.zeros((len(completion_ids), width), dtype=bool)
    order = sorted((i for i in range(len(completion_ids)) if completion_ids[i]), key=lambda i: len(prompt_ids[i]) + len(completion_ids[i]))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        tokens = padded([prompt_ids[i] for i in rows], [completion_ids[i] for i in rows], pad_id, next(model.parameters()).device)
        found = token_outputs(model, hidden_states(model.base_model, tokens), tokens, temperature=temperature).logprobs
        here = tokens.mask.shape[1]
        logprobs[rows, :here], mask[rows, :here] = found.double().cpu().numpy(), tokens.mask.cpu().numpy()
    return logprobs, mask


def text_perplexity(model: Any, tokenizer: Any, path: Path, *, pad_id: int, max_tokens: int = TEXT_TOKENS) -> float:
    """Perplexity per token on the beginning of a text file, in windows that overlap by half.

    Documents are separated by <|endoftext|>; each begins with BOS where the tokenizer has one. Comparable between models of one
    tokenizer. Raises UserError for a file that cannot be read or holds too little.
    """
    width = min(WINDOW, soft.room(model) or WINDOW)
    contexts, scored = text_windows(tokenizer, path, width, max_tokens)
    logprobs, mask = completion_logprobs(model, contexts, scored, temperature=1.0, pad_id=pad_id, batch_size=8)
    return perplexity(logprobs, mask)


def text_windows(tokenizer: Any, path: Path, width: int, max_tokens: int = TEXT_TOKENS) -> tuple[list[list[int]], list[list[int]]]:
    """The beginning of a text file in windows of at most `width` tokens that overlap by half: ids before those that are scored, and those.

    Raises UserError for a file that cannot be read or holds too little.
    """
    contexts, scored = [], []
    for ids in _documents(tokenizer, path, max_tokens):
        cut = list(windows(len(ids), width, width // 2))
        contexts += [ids[w.start : w.scored] for w in cut]
        scored += [ids[w.scored : w.end] for w in cut]
    if not scored:
        raise UserError(f"plain_text {path}: holds fewer than two tokens; perplexity needs a text")
    return contexts, scored


def text_rows(tokenizer: Any, path: Path, positions: int, max_tokens: int = TEXT_TOKENS) -> tuple[list[dict[str, list[int]]], list[int]]:
    """The same windows as rows, {"input_ids", "completion_mask"}, and the number of the document that each is of: windows of one are not independent.

    For a measure of rows. `positions`: tokens that the model reads. Raises UserError as `text_perplexity` does.
    """
    width = min(WINDOW, positions)
    rows, documents = [], []
    for number, ids in enumerate(_documents(tokenizer, path, max_tokens)):
        for w in windows(len(ids), width, width // 2):
            rows.append({"input_ids": ids[w.start : w.end], "completion_mask": [0] * (w.scored - w.start) + [1] * (w.end - w.scored)})
            documents.append(number)
    if not rows:
        raise UserError(f"plain_text {path}: holds fewer than two tokens; perplexity needs a text")
    return rows, documents


def _documents(tokenizer: Any, path: Path, max_tokens: int) -> list[list[int]]:
    """Ids of the documents of a text file, max_tokens of them in all."""
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    documents, left = [], max_tokens
    for part in read_beginning(path, max_tokens * 16).split(SEPARATOR):
        ids = tokenizer(part.strip(), add_special_tokens=False, verbose=False)["input_ids"][:left]
        documents += [start + ids] if ids else []
        left -= len(ids)
    return documents


def read_beginning(path: Path, characters: int = TEXT_TOKENS * 16) -> str:
    """The beginning of a plain text file: by default more characters than any tokenizer puts into TEXT_TOKENS tokens.

    Raises UserError for a file that is not UTF-8 text, or blank.
    """
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(characters)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"plain_text {path}: cannot be read as UTF-8 text: {error}") from error
    if not text.strip():
        raise UserError(f"plain_text {path}: is blank; perplexity needs a text")
    return text


def same_vocabulary(one: dict[str, int], other: dict[str, int]) -> bool:
    """Whether one vocabulary is the other, or the other with tokens added (such as a pad token)."""
    small, large = sorted((one, other), key=len)
    return all(large.get(token) == index for token, index in small.items())
