"""`python -m launch.doctor.torch_facts`: what PyTorch sees, as JSON. A process of its own, for importing torch can hang or crash."""

from __future__ import annotations

import json


def gather() -> dict[str, object]:
    """Build, GPUs, communication backends and threads of this process's torch."""
    import torch
    import torch.distributed

    cuda = torch.cuda.is_available()
    distributed = torch.distributed.is_available()
    return {
        "torch": torch.__version__,
        "cuda build": torch.version.cuda,
        "hip build": torch.version.hip,
        "cuda works": cuda,
        "gpus": [
            {"name": item.name, "memory [MiB]": item.total_memory // 2**20, "bf16": item.major >= 8}
            for item in (torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count() if cuda else 0))
        ],
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if cuda and distributed and torch.distributed.is_nccl_available() else None,
        "gloo": distributed and torch.distributed.is_gloo_available(),
        "threads": torch.get_num_threads(),
        "interop threads": torch.get_num_interop_threads(),
        "mkl": torch.backends.mkl.is_available(),
        "openmp": torch.backends.openmp.is_available(),
        "cpu capability": torch.backends.cpu.get_cpu_capability(),
    }


if __name__ == "__main__":
    print(json.dumps(gather()))
