"""What the machine file asks of DeepSpeed, as `accelerate launch` hands it to the processes; and what can't work with it."""

from __future__ import annotations

import os
import shutil
from typing import Any

from configs.errors import UserError
from stages.training.ranks import say

COMPILER = "g++"
SHARED_MEMORY = "deepspeed_shm_comm"


def uses_deepspeed() -> bool:
    """Whether the machine file says `distributed_type: DEEPSPEED`."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() in ("true", "1")


def plugin() -> Any:
    """Accelerate's DeepSpeedPlugin with what the machine file says, made anew; None without DeepSpeed.

    Raises:
        UserError: a setting of the machine file that Accelerate or DeepSpeed does not take.
    """
    if not uses_deepspeed():
        return None
    from accelerate.utils import DeepSpeedPlugin

    try:
        return DeepSpeedPlugin()
    except (ValueError, OSError) as error:
        raise UserError(f"the machine file's deepspeed_config is refused: {error}") from error


def zero_stage() -> int:
    """The ZeRO stage, 0 to 3; 0 without DeepSpeed."""
    found = plugin()
    return int(found.hf_ds_config.get_value("zero_optimization.stage", 0)) if found else 0


def check_compiler() -> None:
    """Have DeepSpeed do without what it would compile where there is no C++ compiler.

    It reduces over shared memory on the CPU with an operator that it compiles at its first start; without it, gloo does the same.

    Raises:
        UserError: the machine file moves the optimizer's state to main memory: the operator that updates it there can't be left out.
    """
    compiler = os.environ.get("CXX", COMPILER)
    if not uses_deepspeed() or shutil.which(compiler) is not None:
        return
    offload = plugin().hf_ds_config.get_value("zero_optimization.offload_optimizer.device", "none")
    if offload not in (None, "none"):
        raise UserError(
            f"the machine file moves the optimizer's state to {offload}, and DeepSpeed compiles the operator for that with {compiler}, "
            f"which is not on the PATH; install a C++ compiler (Debian: apt install {COMPILER}), set CXX, or take a machine file without offload"
        )
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__[SHARED_MEMORY] = False
    say(f"DeepSpeed: there is no {compiler} to compile its shared-memory operator with, so processes on the CPU reduce over gloo")
