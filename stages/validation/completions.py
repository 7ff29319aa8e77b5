"""Greedy completions in the middle of a training: each process writes its share, and every process gets all of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from configs.schema import Sampling
from configs.schema.validation import Generate
from stages.compat import without_engine_hooks
from stages.ppo.sampling import sample
from stages.tokens import ModelTokens
from stages.validation.rows import Question
from stages.zero.gather import is_split, whole


def complete(trainer: Any, tokens: ModelTokens, questions: Sequence[Question], settings: Generate) -> list[str]:
    """The model's completion of each question, in order, without what ended it; the same list on every process. A collective.

    Questions go to processes in turn, by the length of their prompts, so that each writes about as long. Under ZeRO-3 the weights are whole
    on every process meanwhile, and processes need not keep step.
    """
    from accelerate.utils import gather_object

    accelerator, model = trainer.accelerator, trainer.model
    order = sorted(range(len(questions)), key=lambda i: len(questions[i].prompt_ids))
    mine = order[accelerator.process_index :: accelerator.num_processes]
    was_training = model.training
    model.eval()
    with whole_weights(trainer), accelerator.autocast():
        written = _written(model, [questions[i].prompt_ids for i in mine], tokens, settings) if mine else []
    model.train(was_training)
    texts = dict(gather_object(list(zip(mine, written, strict=True))) if accelerator.num_processes > 1 else zip(mine, written, strict=True))
    return [texts[i] for i in range(len(questions))]


def _written(model: Any, prompt_ids: list[list[int]], tokens: ModelTokens, settings: Generate) -> list[str]:
    sampling = Sampling(max_new_tokens=settings.max_new_tokens, generate_batch_size=settings.batch_size)
    samples = sample(model, prompt_ids, sampling=sampling, eos_ids=tokens.eos_ids, pad_id=tokens.pad_id, seeds=[0] * len(prompt_ids), greedy=True)
    return [tokens.formatter.completion_text(one.completion_ids) for one in samples]


@contextmanager
def whole_weights(trainer: Any) -> Iterator[None]:
    """Within the block every process can call `trainer.model` as often as it likes. A collective where ZeRO-3 has split the weights."""
    parameters = list(trainer.model.parameters())
    if not any(map(is_split, parameters)):
        yield
        return
    engine = trainer.model_wrapped
    trained = hasattr(engine, "empty_partition_cache")  # before the first step there is no engine yet
    if trained:
        engine.empty_partition_cache()
    with whole(parameters), without_engine_hooks(engine) if trained else nullcontext(), torch.no_grad():
        yield
