"""What a cluster's devices and links can do, and what share of it software gets out of them.

Peak figures are the makers' (NVIDIA data sheets, dense bf16, one direction of a link); a node's network is what its adapters
add up to. The shares are in `Efficiency`, apart from the hardware: they belong to a software stack, and they alone are calibrated
(launch/scale/published.py says on which points).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from configs.errors import UserError


@dataclass(frozen=True)
class Device:
    """One GPU. flops: dense, in the precision of the computation, FLOP/s. bandwidth: of its memory, bytes/s. memory: bytes.

    asynchronous: the host queues kernels ahead of the device, so that its own work hides behind the device's (GPUs; CPUs not).
    """

    name: str
    flops: float
    bandwidth: float
    memory: float
    asynchronous: bool = True


@dataclass(frozen=True)
class Network:
    """Links inside a node and between nodes, one direction, bytes/s and seconds per message.

    link: what one device sends to its node's others (NVLink). node: what all adapters of a node together send to other nodes.
    """

    node_size: int
    link: float
    link_latency: float
    node: float
    node_latency: float


@dataclass(frozen=True)
class Efficiency:
    """Shares of the peaks that are reached, and times that do not depend on size.

    gemm: of the FLOP/s by matrix products. memory: of the memory bandwidth. links: of both kinds of links by collectives.
    overlap: share of a pass under which its communication hides. activation_traffic: bytes moved per layer, token, hidden unit and byte
    of a number by all that is not a matrix product, forward. launch: host seconds per layer and forward pass; the default is what eager PyTorch
    takes to decode: 39.2 ms for Llama-7B's 32 layers (pytorch.org/blog/accelerating-generative-ai-2, 25.5 tokens/s on an A100) and 19.4 ms for
    Gemma-2B's 18 in transformers (hf-internal-testing/benchmark_results, 2024-06-12): 1.2 and 1.1 ms a layer.
    """

    gemm: float = 0.77
    memory: float = 0.8
    links: float = 0.8
    overlap: float = 0.8
    activation_traffic: float = 206.0
    launch: float = 1.15e-3


@dataclass(frozen=True)
class Hardware:
    """A cluster of equal nodes."""

    device: Device
    network: Network
    efficiency: Efficiency = field(default_factory=Efficiency)

    def with_efficiency(self, **changes: float) -> Hardware:
        """The same cluster under other software."""
        return replace(self, efficiency=replace(self.efficiency, **changes))

    def nodes(self, devices: int) -> int:
        """Nodes that `devices` devices fill."""
        return -(-devices // self.network.node_size)


CHAT_GEMM = 0.45  # DeepSpeed-Chat's share of the peak, set on OPT-13B on 8 A100-80GB (launch/scale/validate.py)
CHAT_LAUNCH = 0.5e-3  # its fused kernels take fewer launches than eager PyTorch; assumed, no figure is published
GB, GIB = 1e9, 2**30
A100_80 = Device("A100-80GB", 312e12, 2.039e12, 80 * GIB)
A100_40 = Device("A100-40GB", 312e12, 1.555e12, 40 * GIB)
H100 = Device("H100-80GB", 989e12, 3.35e12, 80 * GIB)
H200 = Device("H200-141GB", 989e12, 4.8e12, 141 * GIB)
A6000 = Device("A6000-48GB", 155e12, 0.768e12, 48 * GIB)
NVLINK3 = Network(8, 300 * GB, 3e-6, 200 * GB, 10e-6)  # DGX A100: 600 GB/s of NVLink both ways, eight adapters of 200 Gb/s
NVLINK4 = Network(8, 450 * GB, 3e-6, 400 * GB, 10e-6)  # DGX H100: 900 GB/s both ways, eight adapters of 400 Gb/s
PCIE = Network(8, 25 * GB, 5e-6, 12.5 * GB, 15e-6)  # PCIe 4.0 x16 and one adapter of 100 Gb/s

HARDWARE = {
    "a100-80gb": Hardware(A100_80, NVLINK3),
    "a100-40gb": Hardware(A100_40, NVLINK3),
    "h100-80gb": Hardware(H100, NVLINK4, Efficiency(gemm=0.605)),
    "h200-141gb": Hardware(H200, NVLINK4, Efficiency(gemm=0.605)),
    "a6000-48gb": Hardware(A6000, PCIE),
}
BY_MEMORY = {80: "a100-80gb", 40: "a100-40gb", 141: "h200-141gb", 48: "a6000-48gb"}  # --gpus 8x80GB names no kind: the older one is assumed


def named(name: str) -> Hardware:
    """Hardware by name (case does not matter), such as a100-80gb, or by memory alone: 80GB. Raises UserError."""
    key = name.lower()
    if key.removesuffix("gb").isdigit():
        key = BY_MEMORY.get(int(key.removesuffix("gb")), key)
    if key not in HARDWARE:
        raise UserError(f"no hardware called {name!r}; there are {', '.join(HARDWARE)} (or by memory alone: {', '.join(f'{size}GB' for size in BY_MEMORY)})")
    return HARDWARE[key]
