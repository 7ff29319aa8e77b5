"""Peak memory of one process, phase by phase: the stage's simulation, at few layers and from there to all of them."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from launch.plan.allocations import Peak
from launch.plan.job import Job
from launch.plan.layout import Layout
from launch.plan.simulate import simulation
from launch.plan.spread import GATHERED, gathered, spread

FEW = 4  # layers that are simulated as they are
MARGIN = 0.06  # of a GPU's memory, for fragmentation of the caching allocator
CONTEXT = 600 * 2**20  # bytes of a GPU: CUDA context, kernels and NCCL's buffers
LIBRARIES = 2**30  # bytes of main memory that a process on a CPU takes beside its tensors: about 0.7 GiB of imports, and what Arrow and malloc keep


MOVING = ("activations", "logits", "kv cache")  # kinds that hang on what operations keep; the others follow from shapes


@dataclass(frozen=True)
class Estimate:
    """Bytes of one process by phase."""

    phases: dict[str, Peak]

    @property
    def where(self) -> str:
        """The phase with the highest peak."""
        return max(self.phases, key=lambda name: self.phases[name].total)

    @property
    def peak(self) -> Peak:
        """Its peak."""
        return self.phases[self.where]

    def most(self, kind: str) -> int:
        """The most bytes of one kind in any phase."""
        return max(peak.parts.get(kind, 0) for peak in self.phases.values())

    @property
    def moving(self) -> int:
        """Bytes of activations, logits and caches at the peak."""
        return sum(self.peak.parts.get(kind, 0) for kind in MOVING)

    def measured(self, factor: float, further: int) -> Estimate:
        """With `factor` times the activations, logits and caches in every phase, and `further` bytes of which no part is known."""
        phases = {}
        for name, peak in self.phases.items():
            parts = {kind: int(size * factor) if kind in MOVING else size for kind, size in peak.parts.items()} | {"measured": further}
            phases[name] = Peak(sum(parts.values()), parts, peak.operation)
        return Estimate(phases)


def estimate(job: Job, cfg: Any, layout: Layout) -> Estimate:
    """Simulate a stage. Models of more than a few layers are simulated twice at small depth: what a phase holds is linear in the depth."""
    if job.layers <= FEW:
        return _clamped(job, layout, simulated(job, cfg, layout))
    period = _period(job.config)
    small, large = 2 * period, 3 * period
    if large >= job.layers:
        return _clamped(job, layout, simulated(job, cfg, layout))
    one, two = (simulated(job.with_layers(n), cfg, layout) for n in (small, large))
    return _clamped(job, layout, {name: _extended(one[name], two[name], small, large, job.layers) for name in one if name in two})


def _clamped(job: Job, layout: Layout, phases: dict[str, Peak]) -> Estimate:
    """Of weights that are split, only so many are whole at once."""
    width, text = 2 if job.bf16 else 4, job.config.get_text_config()
    head = max(job.vocabulary or 0, text.vocab_size) * text.hidden_size * width
    out = {}
    for name, peak in phases.items():
        whole = peak.parts.get(GATHERED, 0)
        at_once = whole if job.gathers_once and name.startswith("rollout") else gathered(layout, whole, job.layers, head, keeps=job.keeps_gathered, width=width)
        parts = {**peak.parts, GATHERED: at_once} if whole else peak.parts
        out[name] = Peak(sum(parts.values()), parts, peak.operation)
    return Estimate(out)


def _period(config: Any) -> int:
    """After how many layers the pattern of their kinds repeats."""
    kinds = getattr(config.get_text_config(), "layer_types", None)
    if not kinds:
        return 1
    return next((n for n in range(1, len(kinds)) if kinds[n:] == kinds[:-n]), len(kinds))


def _extended(one: Peak, two: Peak, small: int, large: int, layers: int) -> Peak:
    """A peak at `layers` layers from those at two smaller depths."""

    def at(kind: str) -> int:
        low, high = one.parts.get(kind, 0), two.parts.get(kind, 0)
        return low + (high - low) * (layers - small) // (large - small)

    parts = {kind: at(kind) for kind in {**one.parts, **two.parts}}
    return Peak(sum(parts.values()), parts, two.operation)


def simulated(job: Job, cfg: Any, layout: Layout) -> dict[str, Peak]:
    """The peaks of a simulation at the job's own depth."""
    from launch.plan import ppo, supervised

    vocabulary = max(job.vocabulary or 0, job.config.get_text_config().vocab_size)

    def kind_of(tensor: Tensor) -> str | None:
        return "logits" if tensor.dim() > 1 and tensor.shape[-1] in (vocabulary, TILE) else None

    with _collected(), simulation() as running:
        running.kind_of = kind_of
        around = spread(job, layout, running)
        if job.stage == "ppo":
            ppo.simulate(job, cfg, running, around)
        else:
            supervised.simulate(job, running, around)
        peaks = dict(running.peaks)
    dropped = {"start", "-"} | ({"load"} if layout.zero == 3 or layout.fsdp else set())  # split while it is loaded
    return {name: peak for name, peak in peaks.items() if name not in dropped}


@contextmanager
def _collected() -> Iterator[None]:
    """Free what the block leaves in cycles, looking at no older object: libraries have millions, which took longer than a small simulation.

    Left to a later time, tensors without data would go within another simulation, which crashes the process.
    """
    gc.freeze()
    try:
        yield
        gc.collect()
    finally:
        gc.unfreeze()


TILE = 32768  # columns of the tiles in which TRL computes logits
