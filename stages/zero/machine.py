"""What the machine file asks of DeepSpeed, as `accelerate launch` hands it to the processes; and what can't work with it."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from configs.errors import UserError
from configs.schema import Train
from stages.training.ranks import say
from stages.zero import builds

COMPILER = "g++"
SHARED_MEMORY = "deepspeed_shm_comm"


def uses_deepspeed() -> bool:
    """Whether the machine file says `distributed_type: DEEPSPEED`."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() in ("true", "1")


def refuse_fsdp() -> None:
    """Raise UserError for a machine file with FSDP: Accelerate runs it on the CPU as plain DDP without a word, so that no stage could be
    tested with it, and its saves and weights are laid out otherwise than ZeRO's."""
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("true", "1"):
        raise UserError(
            "the machine file says distributed_type: FSDP, with which this stage has not been shown to train, save and resume; take one with "
            "DeepSpeed ZeRO-3, which splits a model over the processes as well (machine: zero3; on the CPU cpu_zero3)"
        )


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


def check_settings(train: Train, *, bf16: bool, processes: int) -> None:
    """Make sure that a machine file (or the DeepSpeed JSON that it names) leaves to the stage what the stage's config decides.

    Raises:
        UserError: it states a batch size, accumulation, clipping or precision, and another one; or zero_stage 0.
    """
    found = plugin()
    if found is None:
        return
    if not found.hf_ds_config.get_value("zero_optimization.stage", 0):  # DeepSpeed knows no gradient norm then, which is watched for what is not finite
        raise UserError("the machine file says DeepSpeed with zero_stage 0, which splits nothing: take zero_stage 1, 2 or 3, or a file without DeepSpeed (gpu_ddp, cpu_ddp)")
    # key -> what the stage decides, the field it is decided by, what that field says
    ours = {
        "train_batch_size": (train.batch_size, "train.batch_size", train.batch_size),
        "train_micro_batch_size_per_gpu": (train.micro_batch_size, "train.micro_batch_size", train.micro_batch_size),
        "gradient_clipping": (train.max_grad_norm, "train.max_grad_norm", train.max_grad_norm),
        "bf16.enabled": (bf16, "train.precision", train.precision), "fp16.enabled": (False, "train.precision", train.precision),
    }  # fmt: skip
    accumulation = train.batch_size // (train.micro_batch_size * processes)
    if _file_states("gradient_accumulation_steps"):  # Accelerate fills in a 1 of its own where the JSON says nothing
        ours["gradient_accumulation_steps"] = (accumulation, "train.batch_size / train.micro_batch_size", accumulation)
    for key, (value, field, shown) in ours.items():
        stated = found.hf_ds_config.get_value(key)
        if stated not in (None, "auto", value):
            raise UserError(
                f"the machine file says {key}: {stated}, the stage's config {field}: {shown}; a machine file describes machines: remove it there, or write auto"
            )


def _file_states(key: str) -> bool:
    """Whether the DeepSpeed JSON that the machine file names has a key at its top."""
    file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    return file != "none" and key in json.loads(Path(file).read_text(encoding="utf-8"))


def check_compiler(*, own_optimizer: bool = False) -> None:
    """Have DeepSpeed do without what it would compile where it can't.

    It reduces over shared memory on the CPU with an operator that it compiles at its first start; without it, gloo does the same.
    own_optimizer: the stage brings the optimizer that works in main memory (PPO); of DeepSpeed's, which is compiled too, nothing is needed.

    Raises:
        UserError: the machine file moves the optimizer's state to main memory: the operator that updates it there can't be left out.
    """
    if not uses_deepspeed():
        return
    if os.environ.get("LOCAL_RANK", "0") == "0":
        for lock in builds.remove_abandoned_locks():
            print(f"DeepSpeed: removed {lock}, which a build that was killed had left", flush=True)
    lacking = missing_tools()
    if not lacking:
        return
    what = " and ".join(lacking)
    offload = plugin().hf_ds_config.get_value("zero_optimization.offload_optimizer.device", "none")
    if offload not in (None, "none") and not own_optimizer:
        raise UserError(
            f"the machine file moves the optimizer's state to {offload}; DeepSpeed compiles the operator for that, and there is no {what} on the "
            f"PATH: install what is missing (Debian: apt install {COMPILER}; pip install ninja; CXX names another compiler), or take a machine file without offload"
        )
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__[SHARED_MEMORY] = False
    say(f"DeepSpeed: there is no {what} to compile its shared-memory operator with, so processes on the CPU reduce over gloo")


def missing_tools() -> list[str]:
    """What DeepSpeed compiles with and this machine lacks. A ninja that was installed beside Python is put on this process's PATH."""
    beside = Path(sys.executable).parent
    if shutil.which("ninja") is None and (beside / "ninja").exists():
        os.environ["PATH"] = os.pathsep.join([*filter(None, [os.environ.get("PATH")]), str(beside)])
    return [tool for tool in (os.environ.get("CXX", COMPILER), "ninja") if shutil.which(tool) is None]
