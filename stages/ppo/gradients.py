"""Gradients of all processes, added up once per optimizer step.

Not DistributedDataParallel: it wants one backward pass over every parameter, and the update has two, of the policy and of the
value function, so that their graphs are never alive together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

BUCKET = 2**22  # numbers sent at once, 16 MiB in float32: what the exchange adds to the peak


def start_alike(module: nn.Module, accelerator: Any) -> None:
    """Give every process the trained parameters of rank 0, as what they add up from then on is the same."""
    if accelerator.num_processes > 1:
        for parameter in module.parameters():
            if parameter.requires_grad:
                torch.distributed.broadcast(parameter.detach(), src=0)


@torch.no_grad()
def sum_gradients(parameters: Iterable[nn.Parameter], accelerator: Any) -> None:
    """Replace each gradient by its sum over processes: the same bits on every process.

    A parameter without a gradient counts as zero where other processes have one, and stays without where none has.
    """
    if accelerator.num_processes == 1:
        return
    trained = [p for p in parameters if p.requires_grad]
    present = torch.tensor([p.grad is not None for p in trained], device=accelerator.device, dtype=torch.int32)
    torch.distributed.all_reduce(present)
    for parameter, count in zip(trained, present.tolist(), strict=True):
        if count and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    for bucket in _buckets([p.grad for p in trained if p.grad is not None]):
        _sum(bucket)


def _buckets(gradients: list[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours of one dtype, together at most BUCKET numbers; a larger one alone."""
    bucket: list[Tensor] = []
    for gradient in gradients:
        size = sum(g.numel() for g in bucket) + gradient.numel()
        if bucket and (size > BUCKET or gradient.dtype != bucket[0].dtype):
            yield bucket
            bucket = []
        bucket.append(gradient)
    if bucket:
        yield bucket


def _sum(bucket: list[Tensor]) -> None:
    if len(bucket) == 1 and bucket[0].is_contiguous():
        torch.distributed.all_reduce(bucket[0])
        return
    flat = torch.cat([g.reshape(-1) for g in bucket])
    torch.distributed.all_reduce(flat)
    for gradient, part in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
        gradient.copy_(part.view_as(gradient))


def clip_norm(parameters: Iterable[nn.Parameter], limit: float | None) -> Tensor:
    """Scale gradients down to a norm of at most `limit`, where there is one; returns the norm they had, [], on the device."""
    return torch.nn.utils.clip_grad_norm_(parameters, limit if limit is not None else float("inf"))
