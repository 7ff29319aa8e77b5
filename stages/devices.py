"""Which devices a process may use, settled before a library looks for them."""

from __future__ import annotations

import logging
import os


def hide_gpus_if_asked() -> None:
    """Have no library see a GPU where the machine file says `use_cpu`, which reaches a process as ACCELERATE_USE_CPU.

    torch, Accelerate and DeepSpeed each look for themselves; hidden, none of them finds what another leaves alone. Call it before the first
    use of CUDA, which reads the variable once.
    """
    if os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("true", "1"):
        os.environ["CUDA_VISIBLE_DEVICES"] = "-1"


def silence_deepspeed() -> None:
    """Drop what DeepSpeed prints on stdout when it is imported on a machine without GPUs; Accelerate imports it wherever it is installed."""
    logging.getLogger("DeepSpeed").addFilter(_says_something)


def _says_something(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("Setting accelerator to CPU")
