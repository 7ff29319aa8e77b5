"""The few TRL, transformers and sacrebleu symbols that are importable but not promised, each with a test that fails when they change."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch


class TokenStatistics(NamedTuple):
    """What a causal model says about the labelled tokens of a batch. All [B, T - 1]; zero where `counted` is False."""

    logprobs: torch.Tensor  # nats
    correct: torch.Tensor  # the label has the highest probability
    counted: torch.Tensor  # bool


def token_statistics(model: Any, inputs: dict[str, Any], labels: torch.Tensor) -> TokenStatistics:
    """Log-probabilities of `labels` [B, T] (-100 does not count) without building [B, T, V] logits.

    `model` is one that an SFTTrainer or DPOTrainer was built on: they add the fused head whose keyword this uses.
    """
    outputs = model(**{key: value for key, value in inputs.items() if key != "labels"}, labels=labels, fused_lm_head=True)
    counted = labels[:, 1:] != -100
    correct = outputs.is_top1.bool() & counted if outputs.is_top1 is not None else torch.zeros_like(counted)
    return TokenStatistics(outputs.log_probs, correct, counted)


def never_split() -> AbstractContextManager[None]:
    """A context in which transformers builds models whole although ZeRO-3 is on (such as one on the meta device, which has no values)."""
    from transformers.modeling_utils import set_zero3_state

    return set_zero3_state()


@contextmanager
def files_of_weights(split: Callable[[dict[str, Any]], dict[str, list[str]]], written: Callable[[dict[str, Any]], dict[str, Any]]) -> Iterator[None]:
    """Within the block `save_pretrained` of a model puts its tensors into the files that `split` (name -> tensor) says: file -> names; and of each
    file it writes what `written` makes of its tensors, one file at a time.

    transformers itself can only fill files up to a size, in the order of the state dict, and has one dtype.
    """
    from transformers import modeling_utils

    usual, save = modeling_utils.split_torch_state_dict_into_shards, modeling_utils.safe_save_file
    total = {"total_size": 0}  # bytes; goes into the index, which is written last

    def ours(state_dict: dict[str, Any], **options: Any) -> Any:
        found = usual(state_dict, **options)
        files = split({name: state_dict[name] for name in found.tensor_to_filename})
        return replace(found, filename_to_tensors=files, metadata=total, tensor_to_filename={name: file for file, names in files.items() for name in names})

    def saved(tensors: dict[str, Any], filename: str, metadata: dict[str, str] | None = None) -> None:
        kept = written(tensors)
        total["total_size"] += sum(tensor.numel() * tensor.element_size() for tensor in kept.values())
        save(kept, filename, metadata=metadata)

    with mock.patch.multiple(modeling_utils, split_torch_state_dict_into_shards=ours, safe_save_file=saved):
        yield


def remove_printers(trainer: Any) -> None:
    """Take out the callbacks that print raw dictionaries and progress bars; ours prints one line instead."""
    from transformers import PrinterCallback, ProgressCallback

    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)


def place_event_files(trainer: Any, folder: Path) -> None:
    """TensorBoard's files go to `folder`, unless TENSORBOARD_LOGGING_DIR says where: else they lie among the resumable saves, and go with them."""
    from transformers.integrations import TensorBoardCallback

    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback):
            callback.logging_dir = callback.logging_dir or str(folder)


@contextmanager
def without_engine_hooks(engine: Any) -> Iterator[None]:
    """Within the block the hooks that gather and split weights around every module of a ZeRO-3 engine are off."""
    from trl.models.utils import add_hooks, remove_hooks

    remove_hooks(engine)
    try:
        yield
    finally:
        add_hooks(engine)


def exportable(trainer: Any) -> list[tuple[str, dict[str, Any]]]:
    """The states of a Trainer's callbacks and of its control, by class name, as its own saves hold them."""
    from transformers.trainer_callback import ExportableState

    parts = [*trainer.callback_handler.callbacks, trainer.control]
    return [(type(part).__name__, part.state()) for part in parts if isinstance(part, ExportableState)]


@contextmanager
def head_may_be_adapted() -> Iterator[None]:
    """Within the block SFTTrainer takes a model with an adapter on its output head, which its own loss would not train and ours does."""
    from trl.trainer import sft_trainer

    with mock.patch.object(sft_trainer, "BaseTunerLayer", ()):  # isinstance(head, ()) is false
        yield


def corpus_sums(name: str, completions: Sequence[str], references: Sequence[str]) -> tuple[Any, Callable[[Any], float]]:
    """What sacrebleu sums up over rows for `bleu` or `chrf`, [N, S] float64, and the score that such sums [S] come to, 0 to 100."""
    import numpy as np
    from sacrebleu.metrics import BLEU, CHRF

    metric = {"bleu": BLEU, "chrf": CHRF}[name]()
    rows = np.array(metric._extract_corpus_statistics(list(completions), [list(references)]), dtype=np.float64)
    return rows, lambda sums: float(metric._compute_score_from_stats(sums.tolist()).score)
