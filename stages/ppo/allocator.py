"""Memory that is freed and asked for again thousands of times in an update, kept by the process on a CPU."""

from __future__ import annotations

import ctypes
import os
import platform

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
KEPT, LARGEST = 2**29, 2**27  # bytes: free memory that stays with the process, and the largest block that is taken from it


def keep_freed_memory() -> bool:
    """Let glibc reuse blocks of the size of activations and chunks of logits; returns whether it does.

    By default it gives them back to the kernel, which clears every page before it hands it out again: 2.0 of 27 CPU seconds in an
    update of 64 samples of a small model with 32,000 words, 0.7 with this. A MALLOC_ variable in the environment takes precedence.
    """
    if platform.libc_ver()[0] != "glibc" or {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"} & os.environ.keys():
        return False
    libc = ctypes.CDLL("libc.so.6")
    return bool(libc.mallopt(M_TRIM_THRESHOLD, KEPT) and libc.mallopt(M_MMAP_THRESHOLD, LARGEST))
