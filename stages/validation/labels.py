"""Classification by likelihood: of a fixed set of labels, the one whose text the model gives the highest probability after the prompt.

A label's log-prob is the sum over its tokens and the EOS that ends it, so that labels of different lengths are comparable (each is the probability of
saying exactly this) and nothing has to be generated or parsed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from configs.errors import UserError
from stages.data import Demonstration, Formatter
from stages.training.lockstep import per_row, right_padded
from stages.validation.text_metrics import classified, normalised

MAX_LABELS, MAX_CHARACTERS = 64, 100  # of a label set that is taken from the training rows


class Choice(NamedTuple):
    """A row as a choice between labels; `truth` is the label's number, None where the row says none of them."""

    prompt_ids: list[int]
    label_ids: list[list[int]]  # of each label, with the EOS
    truth: int | None


def labels_of(given: Sequence[str] | None, train: Sequence[Demonstration]) -> list[str]:
    """The labels: those given, or the distinct completions of the training rows, in alphabetical order.

    Spellings that are the same once normalised are one label, under the most frequent of them.

    Raises:
        UserError: fewer than two, two given ones that are the same, or completions that are no set of labels.
    """
    if given is not None:
        if len({normalised(label) for label in given} - {""}) < len(given):
            raise UserError(f"evaluation.labels: {', '.join(map(repr, given))}: some are blank or the same but for case and spaces; give each once")
        return list(given)
    spellings: dict[str, Counter[str]] = {}
    for row in train:
        spellings.setdefault(normalised(row.completion), Counter())[row.completion] += 1
    longest = max(map(len, spellings), default=0)
    if not 2 <= len(spellings) <= MAX_LABELS or longest > MAX_CHARACTERS:
        raise UserError(
            f"evaluation.metrics: accuracy is of labels, and the {len(train)} training rows have {len(spellings)} distinct completions of up to {longest} "
            f"characters, which is no set of labels (2 to {MAX_LABELS}, of at most {MAX_CHARACTERS} characters); give evaluation.labels, or take exact_match"
        )
    return sorted(min(found, key=lambda text: (-found[text], text)) for found in spellings.values())


def choices(formatter: Formatter, rows: Sequence[Demonstration], labels: Sequence[str], limit: int, *, strict: bool) -> list[Choice]:
    """Each row that has at most `limit` tokens with any label. `strict`: a row whose completion is no label is an error."""
    numbers = {normalised(label): number for number, label in enumerate(labels)}
    found = []
    for row in rows:
        truth = numbers.get(normalised(row.completion))
        if truth is None and strict:
            raise UserError(f"{row.where}: the completion is none of evaluation.labels ({', '.join(map(repr, labels))}); add it to them, or correct the row")
        choice = Choice(formatter.prompt_ids(row.prompt, row.tools), [formatter.completion_ids(label, row.prompt) for label in labels], truth)
        if len(choice.prompt_ids) + max(map(len, choice.label_ids)) <= limit:
            found.append(choice)
    return found


def classify(trainer: Any, rows: Sequence[Choice], labels: Sequence[str], pad_id: int) -> dict[str, float]:
    """accuracy and macro_f1 over all rows; one whose completion is no label counts as wrong. A collective."""
    logprobs = label_logprobs(trainer, rows, pad_id)
    predicted = [labels[number] for number in logprobs.argmax(dim=1).tolist()]
    return classified(predicted, ["" if row.truth is None else labels[row.truth] for row in rows])


def label_logprobs(trainer: Any, rows: Sequence[Choice], pad_id: int) -> torch.Tensor:
    """Log-prob in nats of each label after each row's prompt, [rows, labels]. A collective."""
    cases = [(row.prompt_ids, ids) for row in rows for ids in row.label_ids]
    device = trainer.accelerator.device

    def read(model: Any, indices: list[int]) -> torch.Tensor:
        mine = [cases[index] for index in indices]
        whole = [prompt + label for prompt, label in mine]
        inputs = {"input_ids": right_padded(whole, pad_id, device), "attention_mask": right_padded([[1] * len(row) for row in whole], 0, device)}
        targets = right_padded([[-100] * len(prompt) + label for prompt, label in mine], -100, device)
        first = max(min(len(prompt) for prompt, _ in mine) - 1, 0)  # the first position whose logits are read: rows are of like length, so few are
        logits, wanted = model(**inputs, use_cache=False, logits_to_keep=targets.shape[1] - first).logits[:, :-1], targets[:, first + 1 :]
        counts = wanted != -100
        of_labels = torch.log_softmax(logits[counts].float(), dim=-1).gather(1, wanted[counts].unsqueeze(1)).squeeze(1)
        return torch.zeros(counts.shape, device=device).masked_scatter(counts, of_labels).sum(1)

    return per_row(trainer, [len(prompt) + len(label) for prompt, label in cases], read).view(len(rows), -1)
