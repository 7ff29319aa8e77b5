"""All checks in the order in which they are told: what the machine has first, what it can do last."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from launch.doctor.check import Check, Result, Settings, run_check
from launch.doctor.collectives import check_gloo, check_nccl
from launch.doctor.compiler import check_compiler
from launch.doctor.gpus import check_gpus
from launch.doctor.hub import check_hub
from launch.doctor.interconnect import check_interconnect
from launch.doctor.processors import check_processors
from launch.doctor.registry import check_registry
from launch.doctor.self_test import check_self_test
from launch.doctor.storage import check_disks, check_limits, check_shared_memory
from launch.doctor.threads import check_torch
from launch.doctor.versions import check_versions

CHECKS = (
    Check("versions", check_versions, 30),
    Check("processors", check_processors),
    Check("GPUs", check_gpus, 45),
    Check("interconnect", check_interconnect, 45),
    Check("torch and threads", check_torch, 120),
    Check("shared memory", check_shared_memory),
    Check("disks", check_disks, 120),
    Check("limits", check_limits),
    Check("hub", check_hub),
    Check("registry", check_registry, 60),
    Check("C++ compiler", check_compiler, 100),
    Check("gloo", check_gloo, 120, slow=True),
    Check("NCCL", check_nccl, 120, slow=True),
    Check("self-test", check_self_test, 270, slow=True),
)


def examine(settings: Settings, checks: Sequence[Check] = CHECKS, say: Callable[[str], None] = lambda _: None) -> tuple[list[Result], list[str]]:
    """(results, names of the checks that --quick left out). One check after the other: they would disturb each other's figures."""
    wanted = [check for check in checks if not (settings.quick and check.slow)]
    results = []
    for check in wanted:
        say(check.name)
        results.append(run_check(check, settings))
    return results, [check.name for check in checks if check not in wanted]
