"""A plan for a person: one screen."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from launch.plan.estimate import CONTEXT, MARGIN
from launch.plan.gpus import GB
from launch.plan.host import PCIE, moved
from launch.plan.report import GIB, Planned

SHOWN = 3  # knobs


def gib(size: float) -> str:
    """Bytes for a person."""
    return f"{size / GIB:.1f}" if size >= GIB else f"{size / 2**20:.0f} Mi"


def duration(hours: float) -> str:
    """Hours for a person: seconds of a small job, days of a large one."""
    for unit, size, top in (("s", 3600.0, 90), ("min", 60.0, 90), ("h", 1.0, 72)):
        if hours * size < top:
            return f"{hours * size:.{0 if hours * size >= 10 else 1}f} {unit}"
    return f"{hours / 24:.1f} days"


def show(plans: Sequence[Planned], notes: Sequence[str], console: Any) -> None:
    """Print the plans."""
    from rich import box
    from rich.table import Table

    first = plans[0].layout
    device = f"{first.device.name}" + (f", {gib(first.device.memory)} GiB" if first.device.memory else "")
    console.print(f"{first.processes} process(es) on {first.nodes} node(s), {device} each; GiB of one process at its peak")
    kinds = sorted({kind for p in plans for kind, size in p.estimate.peak.parts.items() if size > 2**20}, key=lambda k: -max(p.estimate.peak.parts.get(k, 0) for p in plans))
    table = Table(box=box.SIMPLE_HEAD if console.is_terminal else box.ASCII2, pad_edge=False)
    table.add_column("")
    for p in plans:
        table.add_column(p.work.stage, justify="right")
    for kind in kinds:
        table.add_row(kind, *(gib(p.estimate.peak.parts.get(kind, 0)) if p.estimate.peak.parts.get(kind, 0) > 0 else "" for p in plans))
    table.add_row("peak", *(gib(p.estimate.peak.total) for p in plans), style="bold")
    table.add_row("  reached in", *(p.estimate.where for p in plans))
    if any(p.measured is not None for p in plans):
        table.add_row("  measured", *(gib(p.measured) if p.measured is not None else "" for p in plans))
    for name in ("without", "with"):
        found = [p.by_checkpointing.get(name) for p in plans]
        if any(found):
            table.add_row(f"  {name} checkpointing", *(f"{gib(e.peak.total)} (activations {gib(e.most('activations'))})" if e else "" for e in found))
    table.add_row("needed", *(gib(p.needed) for p in plans))
    table.add_row("fits", *({True: "yes", False: "NO", None: "?"}[p.fits] for p in plans), style="bold")
    if any(p.host for p in plans):
        table.add_row("main memory per node", *(gib(sum(p.host.values())) if p.host else "" for p in plans), style="bold")
        for part in dict.fromkeys(part for p in plans for part in p.host):
            table.add_row(f"  {part}", *(gib(p.host[part]) if part in p.host else "" for p in plans))
    table.add_row("machine file", *(p.layout.machine for p in plans))
    table.add_row("micro-batch x accumulation", *(f"{p.work.job.micro_batch} x {p.work.job.accumulation}" for p in plans))
    table.add_row("largest micro-batch", *("?" if p.largest_micro_batch is None else str(p.largest_micro_batch) for p in plans))
    table.add_row("tokens of the longest row", *(str(p.work.job.row_tokens) + ("" if p.work.rows.measured else " *") for p in plans))
    table.add_row("steps", *(str(p.work.steps) if p.work.steps else "?" for p in plans))
    table.add_row("tokens/s", *(f"{p.time.tokens_per_second:,.0f}" if p.time else "?" for p in plans))
    table.add_row("time", *(duration(p.hours) if p.hours is not None else "?" for p in plans))
    if any(p.work.members > 1 for p in plans):
        table.add_row("  of so many models", *(str(p.work.members) if p.work.members > 1 else "" for p in plans))
    if any(p.measured_hours is not None for p in plans):
        table.add_row("  measured", *(duration(p.measured_hours) if p.measured_hours is not None else "" for p in plans))
    table.add_row("disk: saves, published", *(f"{gib(p.disk.saves)}, {gib(p.disk.published)}" for p in plans))
    console.print(table)
    for line in remarks(plans, notes):
        console.print(line, soft_wrap=True)


def show_scale(rows: Sequence[dict[str, Any]], console: Any) -> None:
    """Print time against the number of GPUs."""
    from rich import box
    from rich.table import Table

    if not rows:
        return
    table = Table("stage", "GPUs", "s/step", "tokens/s", "time", "efficiency", "bound by", box=box.SIMPLE_HEAD if console.is_terminal else box.ASCII2, pad_edge=False)
    for row in rows:
        hours = duration(row["hours"]) if row["hours"] is not None else "?"
        table.add_row(row["stage"], str(row["gpus"]), f"{row['step_seconds']:.2f}", f"{row['tokens_per_second']:,.0f}", hours, f"{row['efficiency']:.0%}", row["bound"])
    console.print(table)
    for note in dict.fromkeys(f"{row['stage']} on {row['gpus']}: {note}" for row in rows for note in row["notes"]):
        console.print(note, soft_wrap=True)
    if ahead := [
        f"{row['gpus']}: {row['overlapped']['step_seconds']:.2f} s with {row['overlapped']['rollout_share']:.0%} of them sampling ({row['step_seconds'] / row['overlapped']['step_seconds']:.2f}x)"
        for row in rows if row["overlapped"]
    ]:  # fmt: skip
        console.print(f"ppo if rollouts overlapped with updates, one policy behind, which no stage does: on {'; on '.join(ahead)}", soft_wrap=True)


def assumed(plans: Sequence[Planned]) -> list[str]:
    """What a plan takes for granted of how a stage runs."""
    found = []
    for p in plans:
        if p.work.stage == "ppo" and (p.layout.zero == 3 or p.layout.fsdp) and not p.work.job.gathers_once:
            held = p.estimate.peak.parts.get("parameters", 0) * p.layout.split
            found.append(f"ppo: weights that are split are read layer by layer in rollouts; a rollout that holds all of the policy at once needs up to {gib(held)} more")
    return [*found, *offloaded(plans), *trust(plans), *(note for p in plans for note in p.notes)]


def offloaded(plans: Sequence[Planned]) -> list[str]:
    """What the plan does not know of offloading."""
    found = [
        f"{p.work.stage}: the hours leave out what offloading costs: an optimizer step moves {gib(moved(p.work, p.layout))} per GPU over PCIe ({moved(p.work, p.layout) / PCIE:.1f} s or more at "
        f"{PCIE / GB:.0f} GB/s) and Adam runs on the CPU"
        for p in plans if p.layout.offload_optimizer or p.layout.offload_parameters
    ]  # fmt: skip
    if any(p.host for p in plans):
        node = plans[0].layout.device.node_memory
        short = [p.work.stage for p in plans if node and sum(p.host.values()) > node]
        against = f"the node has {gib(node)}" + (f", too little for {', '.join(short)}" if short else "") if node else "whether the node has as much is not known: give --node-memory"
        found.append(f"main memory per node is what offloaded state takes, and PPO's starting weights, by rule and not measured; page-locked memory may take up to twice as much; {against}")
    return found


def trust(plans: Sequence[Planned]) -> list[str]:
    """How far published times are from the time model as it is used here."""
    if not any(p.time and p.layout.device.gpu for p in plans):
        return []
    from launch.scale.validate import as_planned

    lines = []
    for ppo, what in ((False, "published pretraining speeds"), (True, "DeepSpeed-Chat's published times of PPO")):
        if any((p.work.stage == "ppo") == ppo for p in plans):
            errors = sorted(as_planned(ppo=ppo))
            sizes = [abs(error) for error in errors]
            lines.append(f"hours{' of PPO' if ppo else ''}: of {len(errors)} {what} the model is off by {statistics.median(sizes):.0%} in the median, {errors[0]:+.0%} to {errors[-1]:+.0%} (python -m launch.scale.validate)")
    return lines


def remarks(plans: Sequence[Planned], notes: Sequence[str]) -> list[str]:
    """What would lower each peak, and what the plan assumes."""
    lines = []
    for p in plans:
        if p.knobs:
            lines.append(f"{p.work.stage}: " + ", ".join(f"{name} saves {gib(size)}" for name, size in p.knobs[:SHOWN]))
    lines += [f"note: {note}" for note in [*notes, *assumed(plans)]]
    if any(not p.work.rows.measured for p in plans):
        lines.append("* data or tokenizer not at hand: every row is taken to be as long as the config allows")
    device = plans[0].layout.device
    if device.gpu:
        lines.append(f"needed = peak + {MARGIN:.0%} for fragmentation + {gib(CONTEXT)}B for CUDA and NCCL; time by launch/scale (align plan --scale), at {device.flops / 1e12:.0f} TFLOP/s and {device.bandwidth / 1e12:.2f} TB/s of {device.name}")
    return lines
