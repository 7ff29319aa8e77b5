"""Freed memory stays with the process: seen in page faults, in processes of their own."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

PROGRAM = """
import resource
import torch
from stages.ppo.allocator import keep_freed_memory
kept = keep_freed_memory()
def touch():
    blocks = [torch.ones(2**21) for _ in range(12)]  # 8 MiB each
touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    touch()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def run(**settings):
    clean = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=clean | settings, capture_output=True, text=True, check=True)
    kept, faults = done.stdout.split()
    return kept == "True", int(faults)


def test_blocks_that_are_freed_and_asked_for_again_are_not_asked_of_the_kernel():
    kept, faults = run()
    plain, more = run(MALLOC_MMAP_THRESHOLD_="1048576", MALLOC_TRIM_THRESHOLD_="1048576")
    assert not plain, "what the environment says takes precedence"
    assert kept == (platform.libc_ver()[0] == "glibc")
    if kept:
        assert more > 10_000
        assert faults < more / 5
