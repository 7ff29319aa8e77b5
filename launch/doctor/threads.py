"""PyTorch and its threads: does it load, does it see the GPUs, does it start more threads than there are cores."""

from __future__ import annotations

import os
from typing import Any

from launch.doctor.check import Findings, Settings
from launch.doctor.child import ChildError, ask
from launch.doctor.gpus import DriverError, list_gpus
from launch.doctor.processors import usable_cores

VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OMP_WAIT_POLICY", "OMP_PROC_BIND", "KMP_AFFINITY", "KMP_BLOCKTIME", "GOMP_CPU_AFFINITY", "CUDA_VISIBLE_DEVICES")
REINSTALL = "install torch again for this machine: https://pytorch.org/get-started/locally"


def check_torch(settings: Settings) -> Findings:
    """torch as a stage's process would find it."""
    found = Findings()
    found.facts = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    if settings.quick:
        found.summary = "torch was not loaded (--quick)"
        judge_threads(found, _number(os.environ.get("OMP_NUM_THREADS")), usable_cores())
        return found
    try:
        facts = ask("launch.doctor.torch_facts", seconds=90)
    except ChildError as error:
        found.fail(f"torch cannot be imported: {error}", REINSTALL)
        return found
    found.facts |= facts
    cores = usable_cores()
    where = f"{len(facts['gpus'])} GPU(s), CUDA {facts['cuda build']}, NCCL {facts['nccl']}" if facts["cuda works"] else "CPU only"
    found.summary = f"torch {facts['torch']}, {where}, {facts['threads']} thread(s) on {cores:g} usable core(s)"
    judge_threads(found, facts["threads"], cores)
    _judge_gpus(found, facts)
    if not facts["gloo"]:
        found.fail("this torch has no gloo: several processes cannot meet on CPUs", REINSTALL)
    return found


def judge_threads(found: Findings, threads: int | None, cores: float) -> None:
    """Warn where one process starts more threads than it has cores, or spins while it waits."""
    advice = f"OMP_NUM_THREADS={max(1, int(cores))} for one process, divided by their number for several (`align` sets it where it is unset)"
    if threads is not None and threads > max(1, cores):
        found.warn(f"oversubscribed: {threads} threads on {cores:g} usable core(s)", advice)
    for name in ("MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        number = _number(os.environ.get(name))
        if number is not None and number > max(1, cores):
            found.warn(f"oversubscribed: {name}={number} on {cores:g} usable core(s)", f"unset {name} or set it to {max(1, int(cores))}")
    if os.environ.get("OMP_WAIT_POLICY", "").upper() == "ACTIVE":
        found.warn("OMP_WAIT_POLICY=ACTIVE: waiting threads take cores from others", "OMP_WAIT_POLICY=PASSIVE, unless each process has cores of its own")


def _judge_gpus(found: Findings, facts: dict[str, Any]) -> None:
    try:
        there = len(list_gpus())
    except DriverError:
        return  # told by the check of the GPUs
    if there and not facts["cuda works"]:
        built = facts["cuda build"]
        found.fail(
            f"the driver sees {there} GPU(s), torch sees none ({'built for CUDA ' + built if built else 'a build without CUDA'})",
            "the driver is older than this CUDA, or CUDA_VISIBLE_DEVICES hides them" if built else REINSTALL,
        )
    elif facts["cuda works"] and not all(item["bf16"] for item in facts["gpus"]):
        found.warn("a GPU has no bfloat16 (compute capability below 8.0)", "train.precision: fp32, or other GPUs")


def _number(text: str | None) -> int | None:
    return int(text.partition(",")[0]) if text and text.partition(",")[0].isdigit() else None
