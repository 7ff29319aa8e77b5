"""Chooses what makes a stage fit, at the batch that its config asks for: machine file, checkpointing, micro-batch.

The machine files are tried from the one that communicates least to the one that keeps least on a GPU; of the first that fits, with and
without recomputed activations, the faster one by the time model is taken, with the largest micro-batch that fits and divides the batch.
Accumulation follows from the batch, the micro-batch and the number of processes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from configs.errors import UserError
from launch.plan.gpus import Device
from launch.plan.jobs import prompt_in_front, work_of
from launch.plan.make import STAGES, both_ways, layout_for, plan_stage, refused_at, stages_of
from launch.plan.report import GIB, Planned
from launch.plan.sources import Sources

GPU_ORDER = ("gpu_ddp", "zero2", "zero3", "zero2_offload", "zero3_offload")
CPU_ORDER = ("cpu_ddp", "cpu_zero2", "cpu_zero3")


def fitted(config: Any, kind: str, *, gpus: int, device: Device, nodes: int, only: str | None = None) -> tuple[Any, list[Planned], list[str]]:
    """(the config with what was chosen, the plan of every stage, notes).

    Raises:
        UserError: a stage fits in no way, or its batch can't be shared out over so many processes.
    """
    sources = Sources(base=getattr(config, "base", None))
    plans, changed = [], {}
    for stage, cfg in stages_of(config, kind, only).items():
        found = _fit_stage(stage, cfg, config if kind == "chain" else None, sources, gpus, device, nodes)
        plans.append(both_ways(found))
        changed[stage] = found.work.cfg
    new = changed[kind] if kind in STAGES else config.model_copy(update=changed)
    return new, plans, sources.notes


def _fit_stage(stage: str, cfg: Any, chain: Any, sources: Sources, gpus: int, device: Device, nodes: int) -> Planned:
    """The first machine file that fits, with its faster settings."""
    processes = gpus * nodes
    share = _share(stage, cfg, processes)
    names = (GPU_ORDER if device.gpu else CPU_ORDER) if processes > 1 else (("gpu",) if device.gpu else ("cpu",))
    best: Planned | None = None
    refusals = []
    for name in names:
        layout = layout_for(cfg, name, gpus, device, nodes)
        if problem := refused_at(cfg, layout, prompt_in_front(cfg, chain)):
            refusals.append(f"{name}: {problem}")
            continue
        fits = []
        for checkpointing in (False, True):
            asked = _with(cfg, name, processes, micro_batch_size=1, gradient_checkpointing=checkpointing)
            planned = plan_stage(work_of(stage, asked, layout, sources, chain), layout)
            best = planned if best is None or planned.needed < best.needed else best
            if planned.fits_device is False or (planned.fits_device and not planned.largest_micro_batch):
                continue
            size = max(n for n in range(1, share + 1) if share % n == 0 and n <= (planned.largest_micro_batch or share))
            chosen = _with(asked, name, processes, micro_batch_size=size)
            found = plan_stage(work_of(stage, chosen, layout, sources, chain), layout, knobs=False)
            if not found.fits_node:  # with and without recomputed activations alike; at the largest micro-batch it is least
                short = f"{name}: a node would hold {sum(found.host.values()) / GIB:.1f} GiB of what lies in main memory and has {device.node_memory / GIB:.1f} (--node-memory)"
                refusals += [short] if short not in refusals else []
                continue
            fits.append(replace(found, largest_micro_batch=planned.largest_micro_batch))
        if fits:
            return min(fits, key=lambda p: p.time.seconds if p.time else 0.0)
    least = ""
    if best is not None and best.fits_device is False:
        least = f": the least it needs is {best.needed / GIB:.1f} GiB a process ({best.layout.machine}, a micro-batch of 1, gradient_checkpointing, reached in {best.estimate.where}) and there are {device.memory / GIB:.1f}"
    smaller = ", a smaller sampling.generate_batch_size" if best is not None and best.estimate.where.startswith("rollout") else ""
    raise UserError(
        f"{stage} does not fit on {processes} x {device.name}{least}; use more or larger GPUs (--gpus, --nodes), a `lora:` section{smaller}, or a smaller max_length"
        + "".join(f"; {refusal}" for refusal in refusals)
    )


def _share(stage: str, cfg: Any, processes: int) -> int:
    """Rows of one process per optimizer step."""
    batch = cfg.train.rollout_batch_size // cfg.train.num_minibatches if stage == "ppo" else cfg.train.batch_size
    if batch % processes:
        name = "rollout_batch_size / num_minibatches" if stage == "ppo" else "batch_size"
        raise UserError(f"{stage}.train.{name} is {batch} and there are {processes} processes; --fit keeps the batch as it is: choose a multiple of {processes}")
    return int(batch // processes)


def _with(cfg: Any, machine: str, processes: int, **train: Any) -> Any:
    """A stage's config with another machine file, as many processes of all nodes as are planned for, and other settings of `train`."""
    return cfg.model_copy(update={"machine": machine, "processes": processes, "train": cfg.train.model_copy(update=train)})
