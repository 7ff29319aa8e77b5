"""What one device does in a forward pass, a training pass and a rollout, in seconds.

Assumptions: matrix products reach a fixed share of the peak; what is not a matrix product moves memory and adds its time; attention counts
4 × layers × hidden × length FLOPs per token forward, as in PaLM's definition of model FLOPs (twice what a causal kernel needs, which
makes up for its lower share of the peak); communication hides under a fixed share of the pass it belongs to; rows have equal lengths.
Not modelled: offloading, pipeline and sequence parallelism, imbalance of lengths, the data loader, evaluation and saving, and that all wait
for the slowest: published runs lost 1 to 7 % of a GPU's speed from 16 to 128 GPUs where this predicts none (launch/scale/validate.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from launch.scale.collectives import all_reduce, gather_or_scatter
from launch.scale.facts import ModelShape, PlanFacts
from launch.scale.hardware import Hardware

ADAM_BYTES = 30  # per trained parameter and step: read weight, gradient and two moments in float32, write three, write the 16-bit weight
LOGIT_BYTES = 10  # moved per logit, forward: written in 16 bits, read, written and read again in float32 for the log-softmax


@dataclass(frozen=True)
class Cost:
    """Seconds of one device: arithmetic, memory traffic, all communication, how much of it nothing hides, and host time that nothing hides."""

    compute: float = 0.0
    memory: float = 0.0
    network: float = 0.0
    exposed: float = 0.0
    host: float = 0.0

    @property
    def seconds(self) -> float:
        """Wall time."""
        return self.compute + self.memory + self.exposed + self.host

    @property
    def bound(self) -> str:
        """What takes the most of it: compute, memory, network or host."""
        parts = {"compute": self.compute, "memory": self.memory, "network": self.exposed, "host": self.host}
        return max(parts, key=parts.__getitem__)

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(_values(self), _values(other), strict=True)))

    def times(self, factor: float) -> Cost:
        """The same, `factor` times."""
        return Cost(*(factor * value for value in _values(self)))


def _values(cost: Cost) -> tuple[float, ...]:
    return cost.compute, cost.memory, cost.network, cost.exposed, cost.host


def forward_flops(shape: ModelShape, length: int) -> float:
    """FLOPs of one token's forward pass in a sequence of `length`: 2 per active parameter, and attention."""
    return 2.0 * shape.active + 4.0 * shape.layers * shape.hidden * length


def local(shape: ModelShape, rows: float, length: int, forwards: float, weight_flops: float, hardware: Hardware, width: int) -> Cost:
    """`forwards` passes' worth of work on `rows` sequences, and `weight_flops` per token beside it. width: bytes of a number."""
    device, share = hardware.device, hardware.efficiency
    tokens = rows * length
    flops = tokens * (forwards * forward_flops(shape, length) + weight_flops)
    moved = forwards * (tokens * (shape.layers * shape.hidden * share.activation_traffic * width / 2 + LOGIT_BYTES * shape.vocabulary) + shape.parameters * width)
    cost = Cost(flops / (device.flops * share.gemm), moved / (device.bandwidth * share.memory))
    return _with_host(cost, forwards * shape.layers * share.launch, device.asynchronous)


def _with_host(cost: Cost, host: float, asynchronous: bool) -> Cost:
    """Add the host's time: only what the device's work does not hide, where the host works ahead of it."""
    return replace(cost, host=max(0.0, host - cost.compute - cost.memory) if asynchronous else host)


def hide(cost: Cost, network: float, overlap: float) -> Cost:
    """Add communication, of which a share `overlap` of the pass's own time hides as much as it can."""
    covered = overlap * (cost.compute + cost.memory + cost.host)
    return replace(cost, network=cost.network + network, exposed=cost.exposed + max(0.0, network - covered))


def forward_pass(shape: ModelShape, rows: int, length: int, facts: PlanFacts, devices: int, hardware: Hardware) -> Cost:
    """One device's forward pass of `rows` sequences without gradients, in micro-batches; ZeRO-3 gathers the weights for each."""
    total = Cost()
    for size, count in micro_batches(rows, facts.micro_batch):
        cost = local(shape, size, length, 1.0, 0.0, hardware, facts.weight_bytes)
        gathered = gather_or_scatter(shape.parameters * facts.weight_bytes, devices, hardware, shape.layers) if facts.zero == 3 else 0.0
        total += hide(cost, gathered, hardware.efficiency.overlap).times(count)
    return total


def training_step(shape: ModelShape, rows: int, length: int, facts: PlanFacts, devices: int, hardware: Hardware) -> Cost:
    """One device's share of an optimizer step: micro-batches forward and backward, their communication, the optimizer.

    Per token: the forward pass, the gradients of the activations (as much again), recomputation under checkpointing (again), and the
    gradients of the trained weights. DDP all-reduces once per step under the last backward pass; ZeRO-1 reduce-scatters then and gathers the
    new weights; ZeRO-2 reduce-scatters every micro-batch; ZeRO-3 besides gathers the weights for forward and backward of each.
    """
    share = hardware.efficiency
    forwards = 3.0 if facts.checkpointing else 2.0
    weights = 2.0 * shape.trained + 4.0 * shape.layers * shape.hidden * length  # attention's backward pass costs two forwards of it
    gradients, all_weights = float(shape.trained * facts.gradient_bytes), float(shape.parameters * facts.weight_bytes)
    total, last = Cost(), Cost()
    for size, count in micro_batches(rows, facts.micro_batch):
        last = local(shape, size, length, forwards, weights, hardware, facts.weight_bytes)
        sent = 0.0
        if facts.zero == 3:
            sent += 2 * gather_or_scatter(all_weights, devices, hardware, shape.layers)
        if facts.zero >= 2:
            sent += gather_or_scatter(gradients, devices, hardware, shape.layers)
        total += hide(last, sent, share.overlap).times(count)
    backward = last.times(1 - 1 / (forwards + 1))
    if facts.zero == 0:
        total += _late(all_reduce(gradients, devices, hardware, shape.layers), backward, share.overlap)
    elif facts.zero == 1:
        total += _late(gather_or_scatter(gradients, devices, hardware, shape.layers), backward, share.overlap)
    if facts.zero in (1, 2):
        total += _late(gather_or_scatter(float(shape.trained * facts.weight_bytes), devices, hardware, shape.layers), Cost(), 0.0)
    owned = shape.trained / (devices if facts.zero else 1)
    return total + Cost(memory=owned * ADAM_BYTES / (hardware.device.bandwidth * share.memory))


def _late(network: float, under: Cost, overlap: float) -> Cost:
    """Communication that only `under` can hide."""
    return Cost(network=network, exposed=max(0.0, network - overlap * under.seconds))


def micro_batches(rows: int, size: int) -> list[tuple[int, int]]:
    """[(rows of a micro-batch, how many such)]: full ones and what is left."""
    full, left = divmod(rows, size)
    return [pair for pair in ((size, full), (left, 1 if left else 0)) if pair[1]]


def sampling(facts: PlanFacts, rows: int, devices: int, hardware: Hardware) -> Cost:
    """One device's rollout of `rows` completions: prompts at once, then a token after the other with a cache.

    The prompt's pass is bound by compute. A token's step reads the weights and the cache once: it is bound by memory until the batch is in
    the hundreds, and by the host's launches where the model is small. ZeRO-3 gathers the policy once per rollout or, without room for it,
    for every step. Tensor parallelism t splits weights over t devices whose batches are joined: two all-reduces per layer and step.
    """
    shape, share, device = facts.policy, hardware.efficiency, hardware.device
    width, parts = facts.weight_bytes, facts.tensor_parallel
    weights = float(shape.parameters * width)
    total = Cost()
    for size, count in micro_batches(rows, facts.generate_batch):
        prompt = local(replace(shape, vocabulary=0), size, facts.tokens, 1.0, 0.0, hardware, width)
        context = facts.tokens + facts.new_tokens / 2  # mean length of the cache
        moved = weights / parts + size * context * shape.kv_width * shape.layers * width
        step = Cost(size * forward_flops(shape, math.ceil(context)) / (device.flops * share.gemm), moved / (device.bandwidth * share.memory))
        step = max((replace(step, memory=0.0), replace(step, compute=0.0)), key=lambda cost: cost.seconds)  # a step does both at once
        step = _with_host(step, shape.layers * share.launch, device.asynchronous)
        joined = 2 * shape.layers * all_reduce(parts * size * shape.hidden * width, parts, hardware)
        if facts.zero == 3 and not facts.gather_once:
            joined += gather_or_scatter(weights, devices, hardware, shape.layers)
        total += (prompt + hide(step, joined, 0.0).times(facts.new_tokens)).times(count)
    if facts.zero == 3 and facts.gather_once:
        total += hide(Cost(), gather_or_scatter(weights, devices, hardware, shape.layers), 0.0)
    return total
