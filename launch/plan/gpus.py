"""Devices by name or by size: memory, peak arithmetic, bandwidth, and the share of the peak that training is assumed to reach."""

from __future__ import annotations

import re
from dataclasses import dataclass

from configs.errors import UserError

GIB = 2**30
GB = 10**9


@dataclass(frozen=True)
class Device:
    """One accelerator, or a CPU."""

    name: str
    memory: int  # bytes that a process may allocate
    flops: float  # dense bf16 matrix products a second, as its maker states them
    bandwidth: float  # bytes a second between its memory and its cores
    gpu: bool = True
    node_memory: int = 0  # bytes of main memory of the node that it is in; 0: not known


# Makers' data sheets, dense (without sparsity). Memory is what the driver leaves: a card of "80 GB" shows about 79 GiB.
TABLE = {
    "b200": Device("B200", 178 * GIB, 2250e12, 8.0e12),
    "h200": Device("H200", 139 * GIB, 989e12, 4.8e12),
    "h100": Device("H100 SXM", 79 * GIB, 989e12, 3.35e12),
    "h100pcie": Device("H100 PCIe", 79 * GIB, 756e12, 2.0e12),
    "a100": Device("A100 80GB", 79 * GIB, 312e12, 2.0e12),
    "a100-40gb": Device("A100 40GB", 39 * GIB, 312e12, 1.555e12),
    "l40s": Device("L40S", 44 * GIB, 362e12, 0.864e12),
    "a6000": Device("RTX A6000", 47 * GIB, 155e12, 0.768e12),
    "a10": Device("A10", 22 * GIB, 125e12, 0.6e12),
    "l4": Device("L4", 22 * GIB, 121e12, 0.3e12),
    "v100": Device("V100 32GB", 31 * GIB, 125e12, 0.9e12),
    "4090": Device("RTX 4090", 23 * GIB, 165e12, 1.008e12),
}
BY_SIZE = {192: "b200", 180: "b200", 141: "h200", 80: "a100", 48: "l40s", 40: "a100-40gb", 32: "v100", 24: "a10"}
CPU = Device("CPU", 0, 50e9, 20e9, gpu=False)
SPEC = re.compile(r"^(?:(\d+)\s*x\s*)?(?:(cpu)|(\d+(?:\.\d+)?)\s*gi?b|([a-z0-9][a-z0-9-]*))$", re.IGNORECASE)


def parse_gpus(text: str) -> tuple[int, Device]:
    """(GPUs of one node, the device) from 8x80GB, 4xH100, 24GB, 2xCPU. A size alone is the usual card of that size.

    Raises:
        UserError: none of these.
    """
    found = SPEC.match(text.strip())
    known = f"a size such as 80GB or one of {', '.join(device.upper() for device in TABLE)}"
    if found is None:
        raise UserError(f"--gpus: found {text!r}; expected GPUs of one node as NUMBERxDEVICE, such as 8x80GB or 4xH100, where DEVICE is {known}")
    count = int(found[1] or 1)
    if count < 1:
        raise UserError(f"--gpus: found {text!r}; expected at least one GPU")
    if found[2]:
        return count, CPU
    if found[4]:
        name = found[4].lower().replace("-80gb", "")
        if name not in TABLE:
            raise UserError(f"--gpus: {found[4]!r} is not known; expected {known}")
        return count, TABLE[name]
    size = float(found[3])
    like = TABLE[BY_SIZE[min(BY_SIZE, key=lambda each: (abs(each - size), -each))]]
    memory = like.memory if size in BY_SIZE else int(size * GB * 0.98)
    return count, Device(f"{found[3]}GB (as {like.name})", memory, like.flops, like.bandwidth)
