"""One optimizer step after the first of SFT, the reward model and DPO, within a simulation: the trainers' forward passes and losses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from launch.plan import blueprint
from launch.plan.allocations import Allocations
from launch.plan.job import Job
from launch.plan.simulate import Simulation
from launch.plan.spread import micro_batches
from stages.loss import logprobs as heads
from stages.loss.model import add_token_sums
from stages.loss.sums import TokenSums


def simulate(job: Job, running: Simulation, around: Callable[[Any, Any], AbstractContextManager[Any]]) -> None:
    """Load the stage's models and take an optimizer step. `around(model, trained)` is what the launcher makes of them."""
    running.begin("load")
    model, loss_of = {"sft": _sft, "reward": _reward, "dpo": _dpo}[job.stage](job, running)
    blueprint.checkpoint_layers(job, model)
    if job.checkpointing and job.lora is not None:
        model.enable_input_require_grads()
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    running.label(model.parameters(), "parameters")
    with around(model, trained) as step, _kernels(job):
        for _ in range(micro_batches(job, running)):
            running.begin("forward")
            with torch.autocast("cpu", torch.bfloat16, enabled=job.bf16 and not job.pure_bf16):
                loss = loss_of()
            running.begin("backward")
            loss.backward()
            del loss
        step()


def _sft(job: Job, running: Allocations) -> tuple[Any, Callable[[], Tensor]]:
    model = blueprint.policy(job, frozen=job.lora is not None)
    if job.loss_chunk is not None:
        add_token_sums(model, None if job.loss_chunk == "auto" else int(job.loss_chunk))
        model = blueprint.adapted(model, job, "CAUSAL_LM") if job.lora is not None else model
        return model, lambda: _mean(model(**_batch(job), labels=_labels(job), token_sums=True))
    model = _adapted(model, job, "CAUSAL_LM", ("log_probs", "entropy", "is_top1"))

    def loss() -> Tensor:
        batch = _batch(job)
        outputs = model(**batch, labels=batch["input_ids"].clone(), use_cache=False, fused_lm_head=True)
        return -outputs.log_probs.sum() / outputs.label_mask.sum()

    return model, loss


def _labels(job: Job) -> Tensor:
    """Every row with as many tokens under the loss as the longest completion has, or with all."""
    labels = torch.zeros(job.sequences, job.row_tokens, dtype=torch.long)
    labels[:, : job.row_tokens - (job.completion_tokens or job.row_tokens)] = -100
    return labels


def _mean(sums: TokenSums) -> Tensor:
    return (sums.loss / sums.counted).float()


def _reward(job: Job, running: Allocations) -> tuple[Any, Callable[[], Tensor]]:
    model = blueprint.scorer(job, frozen=job.lora is not None)
    model = blueprint.adapted(model, job, "SEQ_CLS") if job.lora is not None else model

    def loss() -> Tensor:
        chosen, rejected = model(**_batch(job), use_cache=False).logits.squeeze(-1).chunk(2)
        return -F.logsigmoid(chosen - rejected).mean() + 0.01 * ((chosen + rejected) ** 2).mean()

    return model, loss


def _dpo(job: Job, running: Allocations) -> tuple[Any, Callable[[], Tensor]]:
    from trl.trainer.utils import add_fused_lm_head, use_adapter

    model = blueprint.policy(job, frozen=job.lora is not None)
    reference = None
    if job.own_reference:
        reference = blueprint.policy(job, frozen=job.lora is not None).requires_grad_(False)
        running.label(reference.parameters(), "reference")
        add_fused_lm_head(reference)
    model = _adapted(model, job, "CAUSAL_LM", ("log_probs", "entropy", "mean_logits", "is_top1"))

    def loss() -> Tensor:
        batch = _batch(job)
        labels = batch["input_ids"].clone()
        policy = model(**batch, labels=labels, use_cache=False, fused_lm_head=True).log_probs.sum(1)
        with torch.no_grad(), _unchecked(model), ExitStack() as stack:
            if reference is None:
                stack.enter_context(use_adapter(model, None))
            frozen = (reference or model)(**batch, labels=labels, use_cache=False, fused_lm_head=True).log_probs.sum(1)
        chosen, rejected = (policy - frozen).chunk(2)
        return -F.logsigmoid(0.1 * (chosen - rejected)).mean()

    return model, loss


def _unchecked(model: Any) -> AbstractContextManager[Any]:
    from trl.models.utils import disable_gradient_checkpointing

    return disable_gradient_checkpointing(model, {"use_reentrant": False})


def _adapted(model: Any, job: Job, task: str, outputs: tuple[str, ...]) -> Any:
    """The policy as TRL's trainers have it: adapters, and the head that gives log-probs of labels in tiles."""
    from trl.trainer.utils import add_fused_lm_head

    if job.lora is not None:
        model = blueprint.adapted(model, job, task)
    add_fused_lm_head(model.get_base_model() if job.lora is not None else model, outputs=outputs)
    return model


def _batch(job: Job) -> dict[str, Tensor]:
    """The longest rows there can be, none of them padded."""
    ids = torch.zeros(job.sequences, job.row_tokens, dtype=torch.long)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@contextmanager
def _kernels(job: Job) -> Iterator[None]:
    """On a GPU, TRL folds tiles of logits in Triton kernels, which allocate nothing; elsewhere in torch operations."""
    if not job.gpu:
        yield
        return
    with mock.patch.object(heads, "CHUNK_ELEMENTS", heads.CHUNK_ELEMENTS_GPU), mock.patch("trl.kernels.chunked_logprob._forward_tile", _nothing), mock.patch("trl.kernels.chunked_logprob._backward_tile", _nothing):
        yield


def _nothing(*_: Any, **__: Any) -> None:
    """A kernel without scratch space."""
