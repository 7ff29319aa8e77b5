"""A plan as a record with stable keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from launch.plan.disk import Disk
from launch.plan.estimate import CONTEXT, LIBRARIES, MARGIN, Estimate
from launch.plan.host import host_of
from launch.plan.jobs import Work
from launch.plan.layout import Layout
from launch.scale import Row

GIB = 2**30


@dataclass(frozen=True)
class Planned:
    """One stage's plan."""

    work: Work
    layout: Layout
    estimate: Estimate
    time: Row | None
    disk: Disk
    knobs: tuple[tuple[str, int], ...] = ()  # override -> bytes that it saves at the peak
    largest_micro_batch: int | None = None
    other: Estimate | None = None  # with activations recomputed where the config keeps them, and the other way round
    measured: int | None = None  # bytes, by running a few steps
    measured_hours: float | None = None  # by the seconds they took
    factor: float = 1.0  # measured activations, logits and caches over simulated ones
    further: int = 0  # bytes that the measured peak has beside those; fewer where negative
    notes: tuple[str, ...] = ()

    @property
    def hours(self) -> float | None:
        """Of the whole stage, all members of an ensemble one after the other; None where the number of rows is not known."""
        return self.time.hours * self.work.members if self.time and self.work.steps else None

    @property
    def by_checkpointing(self) -> dict[str, Estimate]:
        """"without" and "with" recomputed activations -> the estimate; empty where only the config's own was asked for."""
        if self.other is None:
            return {}
        pair = (self.other, self.estimate) if self.work.job.checkpointing else (self.estimate, self.other)
        return dict(zip(("without", "with"), pair, strict=True))

    def as_measured(self, found: Estimate) -> Estimate:
        """An estimate of this stage in this or another way, corrected by what was measured in this one."""
        return found if self.measured is None else found.measured(self.factor, self.further)

    @property
    def needed(self) -> int:
        """Bytes of a device: the peak, a margin for fragmentation, and what CUDA takes; on a CPU what Python and its libraries take."""
        peak = self.measured if self.measured is not None else self.estimate.peak.total
        return int(peak * (1 + MARGIN)) + (CONTEXT if self.layout.device.gpu else LIBRARIES)

    @property
    def host(self) -> dict[str, int]:
        """Part -> bytes of main memory per node that offloaded state takes; empty where nothing is offloaded."""
        return host_of(self.work, self.layout)

    @property
    def fits(self) -> bool | None:
        """Whether the device has as much, and the node for what is offloaded, where its memory is known; None where the device's is not."""
        return self.fits_device if self.fits_node else False

    @property
    def fits_device(self) -> bool | None:
        """Whether the device has as much; None where its memory is not known."""
        return self.needed <= self.layout.device.memory if self.layout.device.memory else None

    @property
    def fits_node(self) -> bool:
        """Whether the node has the main memory that offloaded state takes, as far as that is known."""
        node = self.layout.device.node_memory
        return not node or sum(self.host.values()) <= node


def record(planned: Planned) -> dict[str, Any]:
    """Keys that stay as they are; bytes, seconds, tokens."""
    work, peak, time = planned.work, planned.estimate.peak, planned.time
    return {
        "stage": work.stage, "machine": planned.layout.machine, "processes": planned.layout.processes, "nodes": planned.layout.nodes,
        "device": {"name": planned.layout.device.name, "memory_bytes": planned.layout.device.memory},
        "micro_batch": work.job.micro_batch, "accumulation": work.job.accumulation, "row_tokens": work.job.row_tokens,
        "gradient_checkpointing": work.job.checkpointing, "rows": work.rows.count, "mean_tokens": round(work.rows.mean, 1), "lengths_measured": work.rows.measured,
        "peak_bytes": peak.total, "peak_phase": planned.estimate.where, "parts_bytes": {k: v for k, v in sorted(peak.parts.items()) if v > 0},
        "phases_bytes": {name: found.total for name, found in planned.estimate.phases.items()}, "measured_bytes": planned.measured, "measured_hours": planned.measured_hours,
        "needed_bytes": planned.needed, "fits": planned.fits, "knobs": [{"set": name, "saves_bytes": saved} for name, saved in planned.knobs],
        "largest_micro_batch": planned.largest_micro_batch, "steps": work.steps,
        "step_seconds": round(time.seconds, 4) if time else None, "tokens_per_second": round(time.tokens_per_second, 1) if time else None,
        "members": work.members, "hours": round(planned.hours, 6) if planned.hours is not None else None,
        "checkpointing": {name: {"peak_bytes": found.peak.total, "activations_bytes": found.most("activations")} for name, found in planned.by_checkpointing.items()},
        "host_bytes": {"parts": planned.host, "total": sum(planned.host.values()), "node_memory": planned.layout.device.node_memory or None},
        "disk_bytes": {"save": planned.disk.save, "saves": planned.disk.saves, "published": planned.disk.published},
    }  # fmt: skip
