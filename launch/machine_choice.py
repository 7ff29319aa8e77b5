"""Why a stage gets the machine file it gets: what the config says, the GPUs there are, and the model's size against their memory."""

from __future__ import annotations

import json
import math
import shutil
import struct
import subprocess
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import UserError
from configs.machines import count_gpus
from launch.command import check_startable

TRAINED = 16  # bytes of a trained parameter: weight, gradient and two moments of Adam, 4 each
SHARED = {"gpu_ddp": 0, "zero1": 8, "zero2": 12, "zero3": 16, "fsdp2": 16}  # of them, those that are split over all processes
ROOM = 0.8  # of a GPU's memory; activations, logits and buffers need the rest
GIB = 2**30


@dataclass(frozen=True)
class Size:
    """Parameters that a stage trains and holds frozen (of all its models together), and what that rests on."""

    trained: int
    frozen: int
    frozen_bytes: float  # of one frozen parameter
    says: str

    def state(self, machine: str, processes: int) -> float:
        """Bytes on each GPU of weights, gradients and optimizer, without activations."""
        shared = SHARED.get(machine, 0)
        frozen = self.frozen * self.frozen_bytes / (processes if shared == TRAINED else 1)
        return self.trained * (TRAINED - shared + shared / processes) + frozen


def gpu_memory() -> int | None:
    """Bytes of the smallest visible GPU, asked of nvidia-smi (0.1 s); None where there is none to ask."""
    if not count_gpus() or shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
        return min(int(line) for line in done.stdout.split()) * 2**20
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def parameters(folder: Path) -> int | None:
    """Parameters in a model folder's *.safetensors, counted in their headers; None where there are none to read."""
    total = 0
    for file in folder.glob("*.safetensors"):
        try:
            with file.open("rb") as stream:
                header = json.loads(stream.read(struct.unpack("<Q", stream.read(8))[0]))
            total += sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
        except (OSError, ValueError, KeyError, struct.error):
            return None
    return total or None


def model_folder(cfg: Any) -> Path | None:
    """Where the weights lie that a stage starts from: a folder or a checkpoint that is there; None for a hub's name or an adapter."""
    from configs.references import is_reference

    folder = Path(cfg.init_from)
    if not folder.is_dir() and is_reference(cfg.init_from) and (cfg.registry / "registry.json").is_file():
        from stages.registry import Registry

        try:
            folder = Registry(cfg.registry, create=False).resolve(cfg.init_from).model_dir
        except UserError:
            return None
    return folder if folder.is_dir() and not (folder / "adapter_config.json").is_file() else None


def size_of(stage: str, cfg: Any) -> Size | None:
    """What a stage holds in memory, from the weights it starts from; None where they are not here or have no headers to count in."""
    from configs.schema import Full, lora_of, technique_of

    folder = model_folder(cfg)
    count = parameters(folder) if folder else None
    if count is None:
        return None
    half = 4.0 if cfg.train.precision == "fp32" else 2.0
    name = f"{cfg.init_from} has {count / 1e9:.3g} billion parameters"
    if not isinstance(technique_of(cfg), Full):
        each = 0.55 if getattr(cfg, "quantization", None) or getattr(lora_of(cfg), "quantization", None) else half
        return Size(0, count, each, f"{name}, frozen under adapters ({each:g} bytes each)")
    frozen = {"dpo": 1, "ppo": 2}.get(stage, 0)
    trained = 2 if stage == "ppo" else 1
    models = {"dpo": ", and a frozen reference", "ppo": ", as policy and value function; frozen as reference and reward model"}
    return Size(trained * count, frozen * count, half, f"{name}, trained in full ({TRAINED} bytes each){models.get(stage, '')}")


def asked_by(cfg: Any, typed: Collection[str]) -> str:
    """Who chose the machine: the command line where it says `machine` or `processes` (`typed`), the config, or nobody."""
    said = {key: value for key, value in (("machine", cfg.machine), ("processes", cfg.processes)) if value not in ("auto", None)}
    if not said:
        return "neither the config nor the command line names a machine file: auto, which takes every GPU of the node, or one CPU process"
    by = {"command line": [key for key in said if key in typed], "config": [key for key in said if key not in typed]}
    lines = [f"the {who} says " + ", ".join(f"{key}: {said[key]}" for key in keys) for who, keys in by.items() if keys]
    return "; ".join(lines) + ("; no machine file is named: auto takes the one for so many processes" if "machine" not in said else "")


def reasons(stage: str, cfg: Any, machine: Any, processes: int, nodes: int, typed: Collection[str] = ()) -> list[str]:
    """Lines that say why `cfg` gets `machine` in `processes` processes of all `nodes`, and whether it can start here."""
    gpus, memory, chosen = count_gpus(), gpu_memory(), machine.path.stem
    lines = [asked_by(cfg, typed)]
    each = f" with {memory / GIB:.0f} GiB" if memory else ""
    lines.append(f"GPUs found here: {gpus}{each}" + (f"; {chosen} leaves them alone" if gpus and machine.use_cpu else ""))
    try:
        check_startable(machine, processes // nodes)
    except UserError as error:
        lines.append(f"can NOT start here: {error}")
    lines.append(f"{processes} process(es): {processes // nodes} on each of {nodes} node(s)")
    size = size_of(stage, cfg)
    if size is None:
        lines.append(f"model size: unknown ({cfg.init_from} is not a folder of whole safetensors here); align plan knows more")
        return lines
    name = chosen.removesuffix("_nodes")
    state = size.state(name, processes)
    lines.append(f"model size: {size.says}: about {state / GIB:.3g} GiB of weights, gradients and optimizer in each process, without activations")
    if memory and name in SHARED:
        fits = [other for other in SHARED if size.state(other, processes) < ROOM * memory]
        if state < ROOM * memory:
            lines.append(f"that fits into {ROOM:.0%} of a GPU")
        else:
            remedy = f"take --machine {fits[0]}" if fits else "take --machine zero3_offload, more nodes, or lora"
            lines.append(f"that does NOT fit into {ROOM:.0%} of a GPU: {remedy}")
    return lines
