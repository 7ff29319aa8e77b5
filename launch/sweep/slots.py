"""Places in which trials run at once: each with its own GPUs, or its share of the CPU's threads."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from configs.errors import UserError
from configs.machines import count_gpus
from launch.batches import batch_problem
from launch.chain.steps import sections, stage_of
from launch.command import load_machine


def places(chain: Any, jobs: int) -> list[dict[str, str]]:
    """What the processes of each place find in their environment, over ours.

    Raises:
        UserError: there are fewer GPUs than jobs, or a job's share of them is smaller than the processes of a stage.
    """
    machines = {name: load_machine(section.machine, section.processes) for name, section in sections(chain).items()}
    gpus = count_gpus()
    if not gpus or all(machine.use_cpu for machine in machines.values()):
        most = max((section.processes or machines[name].processes for name, section in sections(chain).items()), default=1)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        threads = {} if jobs == 1 or "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(max(1, cores // (jobs * most)))}
        return [threads] * jobs
    if jobs == 1:
        return [{}]
    if jobs > gpus:
        raise UserError(f"jobs {jobs}: there are {gpus} GPU(s), and every trial needs its own; give jobs={gpus} or fewer")
    each = gpus // jobs
    for name, section in sections(chain).items():
        if (section.processes or 1) > each:
            raise UserError(f"jobs {jobs}: {stage_of(name)} wants {section.processes} processes, and {gpus} GPUs shared by {jobs} trials are {each} each; lower jobs or processes")
    names = _visible(gpus)
    return [{"CUDA_VISIBLE_DEVICES": ",".join(names[place * each : (place + 1) * each])} for place in range(jobs)]


def _visible(gpus: int) -> list[str]:
    """The names of the GPUs that this process may use."""
    told = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [item.strip() for item in told.split(",")][:gpus] if told else [str(number) for number in range(gpus)]


def check_batches(chain: Any, place: Mapping[str, str]) -> None:
    """Refuse batches that the processes of a place cannot share, which a stage would say once it has started.

    Raises:
        UserError: with every such stage.
    """
    mine = len(place["CUDA_VISIBLE_DEVICES"].split(",")) if "CUDA_VISIBLE_DEVICES" in place else None
    problems = []
    for name, section in sections(chain).items():
        machine = load_machine(section.machine, section.processes)
        processes = section.processes or (mine if mine is not None and not machine.use_cpu and machine.processes > 1 else machine.processes)
        problems.append(batch_problem(stage_of(name), section.train, processes, f"{stage_of(name)}."))
    if any(problems):
        raise UserError("\n".join(dict.fromkeys(problem for problem in problems if problem)))
