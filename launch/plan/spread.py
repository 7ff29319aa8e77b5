"""What the launcher changes in a simulation: what a process keeps of weights, gradients and optimizer, and which buffers it adds.

DeepSpeed itself does not run in the simulation; its buffers are counted by rules read from deepspeed/runtime/zero (0.19.8) and checked
against real runs (tests/bench/plan.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from launch.plan.blueprint import size_of
from launch.plan.job import Job
from launch.plan.layout import Layout
from launch.plan.marks import marked
from launch.plan.simulate import Simulation
from stages.ppo.published import leads_back

STATE = {"adafactor": 0.02, "sgd": 0.0, "adamw_bnb_8bit": 0.5, "paged_adamw_8bit": 0.5, "adamw_8bit": 0.5, "lion_8bit": 0.25}
ADAMW = 2.0  # numbers of optimizer state per trained number, each as wide as the weight it is for
MASTER = 4  # bytes of the float32 weights that DeepSpeed's optimizer keeps
PPO_BUCKET = 16 * 2**20  # bytes; stages/ppo/gradients.py
FROZEN = ("reference", "reward model")
GATHERED = "gathered weights"
START = "starting weights"
BUFFERS = "communication buffers"

Around = Callable[[Any, list[Any]], AbstractContextManager[Callable[[], None]]]


def spread(job: Job, layout: Layout, running: Simulation) -> Around:
    """The context in which a simulation trains: it yields what an optimizer step is."""

    @contextmanager
    def around(model: Any, trained: list[Any]) -> Iterator[Callable[[], None]]:
        with ExitStack() as stack:
            stack.enter_context(marked(running, model, job.layers))
            split = layout.zero or layout.fsdp
            running.lets_gradients_go = bool(split)
            yield (_split if split else _whole)(job, layout, running, model, trained, stack)

    return around


def micro_batches(job: Job, running: Simulation) -> int:
    """How many of a step's micro-batches tell its peak: the second finds gradients there, unless they are let go as they come."""
    return 1 if running.lets_gradients_go else min(job.accumulation, 2)


def _whole(job: Job, layout: Layout, running: Simulation, model: Any, trained: list[Any], stack: ExitStack) -> Callable[[], None]:
    """Every process holds everything; DistributedDataParallel adds buckets as large as the gradients, PPO's own exchange one bucket."""
    for parameter in trained:
        handle = parameter.register_post_accumulate_grad_hook(lambda p: running.see(p.grad, "gradients"))
        stack.callback(handle.remove)
    running.hold("optimizer", int(STATE.get(job.optimizer, ADAMW) * size_of(trained)))
    if layout.ddp:
        running.hold(BUFFERS, min(PPO_BUCKET, size_of(trained)) if job.stage == "ppo" else size_of(trained))
    _published(job, running, model)

    def step() -> None:
        running.begin("optimizer")
        for parameter in trained:
            parameter.grad = None

    return step


def _split(job: Job, layout: Layout, running: Simulation, model: Any, trained: list[Any], stack: ExitStack) -> Callable[[], None]:
    """ZeRO or FSDP: gradients are reduced and let go as they come; the optimizer's state is a share of it."""
    numbers, width, share = sum(p.numel() for p in trained), trained[0].element_size(), layout.split
    sharded = layout.zero == 3 or layout.fsdp
    state = int(numbers * (4 * STATE.get(job.optimizer, ADAMW) + (MASTER if layout.zero else 0))) // share
    running.hold("optimizer", 0 if layout.offload_optimizer else state)
    if sharded:
        running.hold(GATHERED, size_of(model.parameters()) - _read_once(job, model))
        _shard(layout, running)
    keeps = numbers * width // (share if layout.zero >= 2 or layout.fsdp else 1)
    running.hold("gradients", 0 if layout.offload_optimizer else keeps)
    buffers = _bucket(job, layout) * width * (2 if layout.overlaps and layout.zero < 3 and job.stage != "ppo" else 1) if layout.zero else 0
    sending = _Sending(running, buffers, always=sharded)
    for handle in [p.register_post_accumulate_grad_hook(sending.gradient) for p in trained] + [model.register_forward_pre_hook(sending.done)]:
        stack.callback(handle.remove)
    _published(job, running, model)

    def step() -> None:
        sending.done()
        running.begin("optimizer")
        flat = 0 if layout.offload_optimizer else numbers * 4 // share  # the flat float32 gradients that the optimizer reads
        running.hold("gradients", flat)
        running.hold("gradients", -flat)

    return step


def _published(job: Job, running: Simulation, model: Any) -> None:
    """What PPO keeps of the policy to publish other weights than its own; the first ones lie in main memory. Both are refused at ZeRO-3."""
    if job.ema:
        running.hold("average", sum(4 * p.numel() for p in model.policy_parameters()))
    if job.towards_start and not job.gpu:
        running.hold(START, size_of(leads_back(model).values()))


def _bucket(job: Job, layout: Layout) -> int:
    """Numbers that are reduced at once. PPO asks for fewer than DeepSpeed would take, sends nothing while it computes, and has an engine for each model
    that it trains: at ZeRO-3 each has its buffer all the time."""
    if job.stage != "ppo":
        return layout.numbers("reduce_bucket_size")
    from stages.ppo.zero.engines import BUCKET

    return layout.numbers("reduce_bucket_size", BUCKET) * (2 if layout.zero == 3 and job.value_function == "copy" else 1)


def _shard(layout: Layout, running: Simulation) -> None:
    """Count what holds weights as this process's share of it: of the trained models in main memory where they are offloaded."""
    for kind in ("parameters", "value", *FROZEN):
        whole = running.parts.get(kind, 0)
        away = layout.offload_parameters and kind not in FROZEN
        running.hold(kind, -whole + (0 if away else whole // layout.split))


def _read_once(job: Job, model: Any) -> int:
    """Bytes of a frozen input embedding: no backward pass reads it again, so it is let go at once, unless it is the output head too."""
    if job.stage == "ppo" or model.get_input_embeddings().weight.requires_grad:
        return 0
    embedding = model.get_input_embeddings().weight
    head = None if job.stage == "reward" else model.get_output_embeddings()
    return 0 if head is not None and head.weight is embedding else size_of([embedding])


class _Sending:
    """Gradients that are sent as they come: ZeRO-3 has its buffers always, ZeRO-1 and 2 from a backward pass's first gradient to its end."""

    def __init__(self, running: Simulation, buffers: int, *, always: bool) -> None:
        self.running, self.buffers, self.always, self.held = running, buffers, always, False
        if always:
            running.hold(BUFFERS, buffers)

    def gradient(self, parameter: Any) -> None:
        """A gradient is there: it goes into a buffer."""
        if not self.held and not self.always:
            self.running.hold(BUFFERS, self.buffers)
            self.held = True
        parameter.grad = None

    def done(self, *_: Any) -> None:
        """The backward pass is over."""
        if self.held:
            self.running.hold(BUFFERS, -self.buffers)
            self.held = False


def gathered(layout: Layout, whole: int, layers: int, head: int, *, keeps: bool, width: int) -> int:
    """Bytes of weights that are whole at once where `whole` bytes are split: all of a small model, of a large one as much as DeepSpeed lets live.

    A weight stays whole between its uses in the forward and the backward pass while fewer than `stage3_max_reuse_distance` numbers lie
    between them, so the last gigabyte or two of a large model's layers are whole at the turn. Where DeepSpeed `keeps` none, one layer or the head
    (of `head` bytes) is whole. `width`: bytes of a number.
    """
    layer = whole // max(layers, 1)
    if not keeps:
        return min(whole, max((whole - head) // max(layers, 1), head))
    if layout.fsdp:
        return min(whole, 2 * layer)
    live = min(layout.numbers("stage3_max_live_parameters"), layout.numbers("stage3_max_reuse_distance")) * width
    ahead = layout.numbers("stage3_prefetch_bucket_size") * width
    return min(whole, max(live, layer) + ahead)
