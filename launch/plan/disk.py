"""Disk that a stage needs: its resumable saves, and what it publishes."""

from __future__ import annotations

from dataclasses import dataclass

from launch.plan.jobs import Work
from launch.plan.timing import shape_of

SAVES = 3  # two that are kept, and one that is being written
BESTS = 3  # PPO with an evaluation: policies that may yet be published, and one that is being written


@dataclass(frozen=True)
class Disk:
    """Bytes of one save, of all saves at once (and of the best policies that PPO keeps), and of what is published; of all members of an ensemble in the last two."""

    save: int
    saves: int
    published: int


def disk_of(work: Work) -> Disk:
    """Weights in float32 with two moments of Adam in a save, an adapter's alone with adapters; weights in float32 (or bf16) published."""
    shape = shape_of(work.job.config, work.job.lora, scores=work.stage == "reward")
    trained = shape.trained * (2 if work.stage == "ppo" and work.job.value_function != "head" else 1)
    save = 12 * trained
    published = 4 * (shape.trained if work.job.lora else shape.parameters)
    bests = BESTS * 4 * shape.trained if work.job.evaluates else 0
    return Disk(save, work.members * SAVES * save + bests, work.members * published)
