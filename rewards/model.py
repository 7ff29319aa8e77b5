"""The trained reward model as a scorer.

The score is read at the last token of the completion (EOS where it was produced), found by the attention mask. Hugging Face's
own pooling looks for the last token that is not the pad id, which misreads rows whose real tokens include that id.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from configs.errors import UserError
from rewards.protocol import Text, Turn, text_of, turns_of


class Tokens(Protocol):
    """How a reward model's text becomes ids: its own tokenizer and template."""

    def prompt_ids(self, messages: tuple[Turn, ...]) -> list[int]:
        """Ids of a prompt, ending where the completion begins."""
        ...

    def completion_ids(self, text: str, prompt: tuple[Turn, ...]) -> list[int]:
        """Ids of a completion that is not empty, ending with EOS and nothing after it."""
        ...


def backbone_and_head(model: nn.Module, head: nn.Module | None = None) -> tuple[nn.Module, nn.Module]:
    """The transformer under a sequence classifier (possibly with adapters), and its head with one output.

    `head` given: it belongs to the model, such as a value or reward head on a shared backbone. Raises UserError for a model
    without a head of one output.
    """
    inner: Any = getattr(model, "module", model)
    inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    backbone = getattr(inner, getattr(inner, "base_model_prefix", ""), inner)
    found = head if head is not None else getattr(inner, "score", getattr(inner, "classifier", None))
    if found is None:
        raise UserError(f"{type(inner).__name__} has no score head; expected a sequence classification model with one label")
    labels = getattr(getattr(inner, "config", None), "num_labels", 1)
    if head is None and labels != 1:
        raise UserError(f"{type(inner).__name__} has {labels} labels; a reward model has 1")
    return backbone, found


def last_token_scores(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, head: nn.Module | None = None) -> Tensor:
    """Score of each row at its last real token.

    input_ids [B, L], attention_mask [B, L] (1 counts; padding on either side). Returns [B] in fp32.
    """
    backbone, found = backbone_and_head(model, head)
    position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    arguments = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
    if "position_ids" in inspect.signature(backbone.forward).parameters:
        arguments["position_ids"] = position_ids
    hidden = backbone(**arguments).last_hidden_state  # [B, L, H]
    columns = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    last = (columns * attention_mask.long()).argmax(-1)
    pooled = hidden[torch.arange(hidden.shape[0], device=hidden.device), last]  # [B, H]
    weight = next(found.parameters(), None)
    # Never in bf16: scores between 4 and 8 would be multiples of 1/32.
    with torch.autocast(pooled.device.type, enabled=False):
        return found(pooled if weight is None else pooled.to(weight.dtype)).squeeze(-1).float()


@contextmanager
def dropout_off(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode, and back afterwards to the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    left = [type(module).__name__ for module in model.modules() if module.training]
    assert not left, f"scoring with dropout: {left[:3]} stay in training mode after eval()"
    try:
        yield
    finally:
        for module in training:
            module.training = True


class RewardModelScorer:
    """Scores completions with a sequence classification model of one label. Scores are raw: neither centred nor scaled.

    tokens: the model's own formatter, for the text path. token_key: names tokenizer and template, equal for a policy whose ids
    the model can read. mean, std: of its scores on the demonstrations. batch_size: rows per forward pass. autocast: dtype of
    matrix products; None computes in the weights' own. widen: from tokens of the longest row to columns of the batch, where a
    machine computes some widths faster. The head stays in its own either way. eos_ids: the first is the one the
    model was trained to read.
    """

    def __init__(
        self,
        model: nn.Module,
        tokens: Tokens,
        *,
        name: str = "reward",
        pad_id: int,
        eos_ids: Sequence[int],
        token_key: str | None = None,
        mean: float = 0.0,
        std: float = 1.0,
        batch_size: int = 32,
        head: nn.Module | None = None,
        autocast: torch.dtype | None = None,
        widen: Callable[[int], int] | None = None,
    ) -> None:
        if pad_id in set(eos_ids):
            raise UserError(f"reward model {name}: its pad token is its EOS ({pad_id}); train it with a pad token of its own")
        backbone_and_head(model, head)
        self.name, self.model, self.tokens, self.head = name, model, tokens, head
        self.pad_id, self.eos_ids, self.token_key = pad_id, list(eos_ids), token_key
        self.mean, self.std, self.batch_size, self.autocast, self.widen = mean, std, batch_size, autocast, widen
        config = getattr(model, "config", None)
        self.max_length: int | None = getattr(config, "max_position_embeddings", None)

    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text], **columns: Any) -> list[float]:
        """Scores of text, rendered with the model's own template.

        The column `finished` (list of bool), where it is given, says which completions ended with EOS; the others are scored at
        their last token, without an EOS they never produced. Of a row longer than the model reads the beginning is left out, with
        a warning that says how many there were: how long text comes out in another tokenizer is known only when it is written.
        """
        finished = columns.get("finished") or [True] * len(completions)
        turns = [turns_of(prompt) for prompt in prompts]
        rows = zip(turns, map(text_of, completions), finished, strict=True)
        completion_ids = [self._completion_ids(prompt, text, end) for prompt, text, end in rows]
        return self.score_ids(*self._cut_left([self.tokens.prompt_ids(prompt) for prompt in turns], completion_ids)).tolist()

    def _cut_left(self, prompt_ids: list[list[int]], completion_ids: list[list[int]]) -> tuple[list[list[int]], list[list[int]]]:
        """Rows of at most max_length tokens, ending as they did."""
        over = [max(0, len(p) + len(c) - self.max_length) if self.max_length else 0 for p, c in zip(prompt_ids, completion_ids, strict=True)]
        if any(over):
            cut = sum(map(bool, over))
            warnings.warn(f"reward model {self.name}: {cut} of {len(over)} rows had more than the {self.max_length} tokens it reads; their beginning was left out", stacklevel=3)
        return (
            [prompt[n:] for prompt, n in zip(prompt_ids, over, strict=True)],
            [ids[max(0, n - len(prompt)) :] for prompt, ids, n in zip(prompt_ids, completion_ids, over, strict=True)],
        )

    def _completion_ids(self, prompt: tuple[Turn, ...], text: str, finished: bool) -> list[int]:
        ids = list(self.tokens.completion_ids(text, prompt)) if text else [self.eos_ids[0]]
        return ids[:-1] if not finished and ids[-1] in self.eos_ids else ids

    def _ended_as_trained(self, completion: Sequence[int], finished: bool) -> list[int]:
        """The completion with its last EOS replaced by the one that stood in the training data: a policy may have several.

        A finished completion without an EOS (of a fixed length) gets that one: elsewhere the model never learned to read a score.
        """
        ids = list(completion)
        if ids and ids[-1] in self.eos_ids:
            return [*ids[:-1], self.eos_ids[0]]
        return [*ids, self.eos_ids[0]] if finished else ids

    def score_ids(
        self, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]], finished: Sequence[bool] | None = None
    ) -> Tensor:
        """Scores [B] (fp32, on the model's device) at the last token of each completion; rows carry no padding.

        `finished` [B] says which completions ended, as the column of the text path does; an EOS is read after one that has none
        (None: the ids are read as they are). An empty completion that did not end is scored at the end of its prompt.
        Raises UserError for a row longer than the model can read.
        """
        ended = finished if finished is not None else [False] * len(completion_ids)
        completions = [self._ended_as_trained(ids, end) for ids, end in zip(completion_ids, ended, strict=True)]
        rows = [[*prompt, *completion] for prompt, completion in zip(prompt_ids, completions, strict=True)]
        device = next(self.model.parameters()).device
        scores = torch.empty(len(rows), device=device)
        longest = max(map(len, rows), default=0)
        if self.max_length is not None and longest > self.max_length:
            raise UserError(f"reward model {self.name}: a row has {longest} tokens, the model reads {self.max_length}; shorten prompts or completions")
        assert all(rows), "a row without any token cannot be scored"
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]), reverse=True)
        precision = torch.autocast(device.type, dtype=self.autocast, enabled=self.autocast is not None)
        with dropout_off(self.model), torch.no_grad(), precision:
            for start in range(0, len(order), self.batch_size):
                chosen = order[start : start + self.batch_size]
                ids, mask = _pad_right([rows[i] for i in chosen], self._width(len(rows[chosen[0]])), self.pad_id, device)
                scores[chosen] = last_token_scores(self.model, ids, mask, self.head)
        return scores

    def _width(self, longest: int) -> int:
        """Columns of a batch whose longest row has so many tokens."""
        wide = self.widen(longest) if self.widen is not None else longest
        return max(longest, min(wide, self.max_length or wide))


def _pad_right(rows: list[list[int]], width: int, pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows as ids [B, L] and their mask [B, L], L being `width`."""
    ids = torch.tensor([row + [pad_id] * (width - len(row)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    return ids, mask
