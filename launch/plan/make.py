"""Plans the stages of a chain or of one stage's config."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from configs.errors import UserError
from configs.splitting import refused
from launch.plan.disk import disk_of
from launch.plan.estimate import estimate
from launch.plan.gpus import Device
from launch.plan.jobs import Work, work_of
from launch.plan.layout import Layout, layout_of
from launch.plan.report import Planned
from launch.plan.sources import Sources
from launch.plan.timing import facts_of, hardware_of
from launch.scale import scale

STAGES = ("sft", "reward", "dpo", "ppo")


def stages_of(config: Any, kind: str, only: str | None = None) -> dict[str, Any]:
    """Stage -> its config, in order.

    Raises:
        UserError: `only` names a stage the chain lacks.
    """
    found = {kind: config} if kind in STAGES else {stage: getattr(config, stage) for stage in STAGES if getattr(config, stage) is not None}
    if only is not None and only not in found:
        raise UserError(f"--only {only}: the file has no stage {only!r}; it has {', '.join(found)}")
    return {stage: cfg for stage, cfg in found.items() if only in (None, stage)}


def layout_for(cfg: Any, machine: str | None, gpus: int, device: Device, nodes: int) -> Layout:
    """The layout of a stage: `machine` or the config's own machine file, on so many GPUs of so many nodes."""
    from launch.command import load_machine

    name = machine or cfg.machine
    if name == "auto":
        name = ("gpu_ddp" if device.gpu else "cpu_ddp") if gpus * nodes > 1 else ("gpu" if device.gpu else "cpu")
    return layout_of(load_machine(name, gpus * nodes, nodes), device, gpus * nodes, nodes)


def refused_at(cfg: Any, layout: Layout, prompt_in_front: bool) -> str | None:
    """Why the stage itself would refuse this layout (configs/splitting.py); None where it runs."""
    return refused(cfg, layout.zero, offload_optimizer="cpu" if layout.offload_optimizer else "none", prompt_in_front=prompt_in_front)


def plan_stage(work: Work, layout: Layout, *, knobs: bool = True) -> Planned:
    """Memory, time and disk of a stage."""
    found = estimate(work.job, work.cfg, layout)
    row = scale(facts_of(work, layout), [layout.processes], hardware_of(layout.device))[0]
    planned = Planned(work, layout, found, row, disk_of(work))
    if knobs:
        planned = replace(planned, largest_micro_batch=largest(work, layout, planned))
    return planned


def knobs_of(planned: Planned) -> tuple[tuple[str, int], ...]:
    """What would lower the peak, and by how many bytes; the largest saving first."""
    work, layout, now = planned.work, planned.layout, planned.as_measured(planned.estimate)
    job, tries = work.job, {}
    if job.micro_batch > 1:
        tries[f"train.micro_batch_size={job.micro_batch // 2}"] = (replace(job, micro_batch=job.micro_batch // 2, accumulation=max(2, job.accumulation)), layout)
    if layout.processes > 1 and layout.zero < 3 and not layout.fsdp and not (job.stage == "ppo" and job.lora):
        tries["machine=zero3"] = (job, replace(layout, machine="zero3", zero=3, ddp=False))
    if layout.zero and not layout.offload_optimizer:
        name = "zero3_offload" if layout.zero == 3 else "zero2_offload"
        tries[f"machine={name}"] = (job, replace(layout, machine=name, offload_optimizer=True, offload_parameters=layout.zero == 3))
    if job.stage == "ppo" and not job.offload_frozen and (job.own_reference or job.reward_models or job.heldout_models) and layout.device.gpu and layout.zero < 3:
        tries["offload_frozen=true"] = (replace(job, offload_frozen=True), layout)
    if job.stage == "ppo" and job.generate_batch > 1 and now.where.startswith("rollout"):
        tries[f"sampling.generate_batch_size={job.generate_batch // 2}"] = (replace(job, generate_batch=job.generate_batch // 2), layout)
    if job.stage == "ppo" and job.gathers_once and layout.zero == 3 and now.where.startswith("rollout"):
        tries["engine.gather=layer"] = (replace(job, gathers_once=False), layout)
    possible = {name: found for name, found in tries.items() if refused_at(work.cfg, found[1], work.prompt_in_front) is None}
    saved = {name: now.peak.total - planned.as_measured(estimate(changed, work.cfg, place)).peak.total for name, (changed, place) in possible.items()}
    if not job.checkpointing and planned.other is not None:
        saved["train.gradient_checkpointing=true"] = now.peak.total - planned.as_measured(planned.other).peak.total
    return tuple(sorted(((name, size) for name, size in saved.items() if size > 0), key=lambda pair: -pair[1]))


def largest(work: Work, layout: Layout, planned: Planned) -> int | None:
    """The largest micro-batch that fits: every phase is linear in it, so one more simulation tells. 0 where not even one row does."""
    if not layout.device.memory or (work.stage == "ppo" and planned.estimate.where.startswith("rollout") and planned.fits_device is False):
        return None if not layout.device.memory else 0
    job = work.job
    other = 1 if job.micro_batch > 1 else 2
    found = {job.micro_batch: planned.estimate, other: estimate(replace(job, micro_batch=other, accumulation=2), work.cfg, layout)}
    found = {size: planned.as_measured(each) for size, each in found.items()}
    low, high = min(found), max(found)

    def needed(size: int) -> int:
        def total(name: str) -> int:
            one, two = found[low].phases[name].total, found[high].phases[name].total
            return one + (two - one) * (size - low) // (high - low)

        peak = max(total(name) for name in found[low].phases if name in found[high].phases)
        return replace(planned, measured=peak).needed

    size = 0
    for step in (2**k for k in range(12, -1, -1)):
        if needed(size + step) <= layout.device.memory:
            size += step
    return size


def works(config: Any, kind: str, layouts: Callable[[Any], Layout], sources: Sources, only: str | None) -> list[tuple[Work, Layout]]:
    """Every stage's work and layout."""
    found = []
    for stage, cfg in stages_of(config, kind, only).items():
        layout = layouts(cfg)
        found.append((work_of(stage, cfg, layout, sources, config if kind == "chain" else None), layout))
    return found


def both_ways(planned: Planned) -> Planned:
    """The plan of a stage with the estimate of the other choice about recomputed activations beside its own."""
    job = planned.work.job
    return replace(planned, other=estimate(replace(job, checkpointing=not job.checkpointing), planned.work.cfg, planned.layout))


def plan(config: Any, kind: str, *, gpus: int, device: Device, nodes: int, machine: str | None = None, only: str | None = None, knobs: bool = True) -> tuple[list[Planned], list[str]]:
    """The plan of every stage, and notes on what it rests on.

    Raises:
        UserError: a model config that can't be read, batch sizes that do not divide, an unknown machine file.
    """
    sources = Sources(base=getattr(config, "base", None))
    found = works(config, kind, lambda cfg: layout_for(cfg, machine, gpus, device, nodes), sources, only)
    out = [plan_stage(work, layout, knobs=knobs) for work, layout in found]
    if knobs:
        out = [both_ways(p) for p in out]
    highest = max(out, key=lambda planned: planned.needed)
    if knobs:
        out = [replace(p, knobs=knobs_of(p)) if p is highest or p.fits is False else p for p in out]
    return out, sources.notes
