"""Machine files: which one a stage runs with, by name, path or what this machine has."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from configs.errors import UserError

FOLDER = Path(__file__).parent / "accelerate"
NODES = "_nodes"  # ends the name of the file for several nodes: zero3_nodes beside zero3


def machine_names() -> list[str]:
    """Names of the machine files that ship."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def purpose(path: Path) -> tuple[str, str]:
    """What a machine file is and when to take it: its first two lines; empty where it does not say."""
    lines = path.read_text(encoding="utf-8").splitlines()[:2]
    first, second = ([line[1:].strip() if line.startswith("#") else "" for line in lines] + ["", ""])[:2]
    return first, second


def machine_file(name: str = "auto", processes: int | None = None, nodes: int = 1) -> Path:
    """The Accelerate config that `name` means: auto, a name in configs/accelerate, or a path to a YAML file.

    With several `nodes`, the file that ships for them beside the one that is named. UserError where there is none.
    """
    if name == "auto":
        name = pick_machine(count_gpus(), processes, nodes)
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        if not path.is_file():
            raise UserError(f"machine: {name}: no such file; give a path to an Accelerate config or one of {', '.join(machine_names())}")
        return path
    if name not in machine_names():
        close = difflib.get_close_matches(name, machine_names(), n=1)
        hint = f". Did you mean {close[0]!r}?" if close else ""
        raise UserError(f"machine: found {name!r}; expected auto, {', '.join(machine_names())} or a path to an Accelerate config{hint}")
    if nodes > 1 and not name.endswith(NODES):
        if name + NODES not in machine_names():
            raise UserError(f"machine: {name} is one process, and {nodes} nodes were asked for; take one of {', '.join(for_nodes())}")
        name += NODES
    return FOLDER / f"{name}.yaml"


# What Accelerate reads of a machine file (ClusterConfig of accelerate/commands/config/config_args.py, 1.10 to 1.15), and of its deepspeed_config
# (the options of that name of `accelerate launch`). Of a key it does not know in the latter it says nothing and does without.
KEYS = (
    "compute_environment", "distributed_type", "mixed_precision", "use_cpu", "debug", "num_processes", "machine_rank", "num_machines", "gpu_ids",
    "main_process_ip", "main_process_port", "rdzv_backend", "same_network", "main_training_function", "enable_cpu_affinity", "fp8_config",
    "deepspeed_config", "fsdp_config", "parallelism_config", "megatron_lm_config", "mpirun_config", "downcast_bf16", "tpu_name", "tpu_zone",
    "tpu_use_cluster", "tpu_use_sudo", "command_file", "commands", "tpu_vm", "tpu_env", "dynamo_config", "dynamo_backend", "fp16",
)  # fmt: skip
DEEPSPEED_KEYS = (
    "deepspeed_config_file", "zero_stage", "offload_optimizer_device", "offload_param_device", "offload_optimizer_nvme_path", "offload_param_nvme_path",
    "gradient_accumulation_steps", "gradient_clipping", "zero3_init_flag", "zero3_save_16bit_model", "deepspeed_hostfile", "deepspeed_exclusion_filter",
    "deepspeed_inclusion_filter", "deepspeed_multinode_launcher", "deepspeed_moe_layer_cls_names",
)  # fmt: skip
OTHER_ACCELERATORS = ("kfd", "dxg", "nvgpu", "davinci_manager", "accel")  # under /dev: AMD, WSL, Jetson, Ascend, Gaudi


def check_settings(settings: Mapping[str, Any], path: str) -> None:
    """Refuse keys of a machine file that Accelerate does not know.

    Raises:
        UserError: with every such key, and the one that may be meant.
    """
    deepspeed = settings.get("deepspeed_config") or {}
    if not isinstance(deepspeed, Mapping):
        raise UserError(f"{path}: deepspeed_config: found {deepspeed!r}; expected keys such as zero_stage: 2")
    problems = [_unknown(key, KEYS, "") for key in settings if key not in KEYS]
    problems += [_unknown(key, DEEPSPEED_KEYS, "deepspeed_config.") for key in deepspeed if key not in DEEPSPEED_KEYS]
    if problems:
        raise UserError("\n".join(f"{path}: {problem}" for problem in problems))


def _unknown(key: Any, known: Sequence[str], section: str) -> str:
    close = difflib.get_close_matches(str(key), known, n=1)
    hint = f". Did you mean {close[0]!r}?" if close else "; DeepSpeed's own settings go into a JSON file that deepspeed_config_file names" if section else ""
    return f"{section}{key}: Accelerate knows no such key{hint}"


def other_accelerators() -> bool:
    """Whether this machine shows signs of an accelerator that is not counted by `count_gpus`: of another maker, or behind a driver of its own."""
    return any((Path("/dev") / name).exists() for name in OTHER_ACCELERATORS)


def read_machine(path: Path) -> dict[str, Any]:
    """The settings of a machine file, read as strictly as a config. UserError where it is no mapping, or not YAML."""
    from configs.yaml_lines import parse, read_text

    document = parse(read_text(path), str(path))
    found = {} if document.data is None else document.data
    problems = [f"{path}:{line}: {message}" for line, message in document.problems]
    if problems or not isinstance(found, dict):
        raise UserError("\n".join(problems) or f"{path}:1: expected the keys of an Accelerate config")
    check_settings(found, str(path))
    return found


def for_nodes() -> list[str]:
    """Names of the machine files that ship for several nodes."""
    return [name for name in machine_names() if name.endswith(NODES)]


def pick_machine(gpus: int, processes: int | None = None, nodes: int = 1) -> str:
    """The machine file that fits: every GPU is used unless `processes` (of all nodes) says otherwise; without one, a single CPU process."""
    several = (processes or max(gpus, 1) * nodes) > 1
    name = ("gpu_ddp" if several else "gpu") if gpus else ("cpu_ddp" if several else "cpu")
    return name + NODES if nodes > 1 else name


def count_gpus() -> int:
    """NVIDIA GPUs that a process started now would see, without importing torch (seconds)."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = [p for p in Path("/dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", p.name)]
    if visible is None or not devices:
        return len(devices)
    chosen = []
    for item in visible.split(","):
        if item.strip() in ("", "-1"):
            break  # CUDA reads the list up to the first entry that is none
        chosen.append(item)
    return len(chosen)
