"""What collectives cost on rings and trees, inside a node and across nodes. Seconds; sizes in bytes of the whole tensor.

Sources: Thakur, Rabenseifner and Gropp 2005 (ring and tree costs); NCCL's documentation of bus bandwidth. A ring over several nodes has
one path per network adapter, so what bounds it is the slower of one device's link and one node's adapters together.
"""

from __future__ import annotations

import math

from launch.scale.hardware import Hardware


def gather_or_scatter(size: float, devices: int, hardware: Hardware, messages: int = 1) -> float:
    """All-gather or reduce-scatter of `size` bytes in `messages` equal pieces, on a ring.

    Each device sends (n - 1) / n of the bytes over its link, and each node takes in what it does not hold, (n - g) / n, over its
    adapters; both go on at once. Latency: n - 1 hops per message, of which one per node leaves the node.
    """
    if devices == 1:
        return 0.0
    network, share = hardware.network, hardware.efficiency.links
    inside = min(devices, network.node_size)
    nodes = hardware.nodes(devices)
    times = [size * (devices - 1) / devices / (network.link * share)] if inside > 1 else []
    if nodes > 1:
        times.append(size * (devices - inside) / devices / (network.node * share))
    crossings = nodes if nodes > 1 else 0
    latency = (devices - 1 - min(crossings, devices - 1)) * network.link_latency + min(crossings, devices - 1) * network.node_latency
    return max(times) + messages * latency


def all_reduce(size: float, devices: int, hardware: Hardware, messages: int = 1) -> float:
    """All-reduce: the better of a ring (reduce-scatter, then all-gather) and, across nodes, a tree.

    The tree (NCCL's double binary tree) goes up and down once over the nodes: 2 log2(nodes) hops, and every node's adapters carry the bytes
    once each way; inside nodes they are reduced and spread on a ring's terms.
    """
    ring = 2 * gather_or_scatter(size, devices, hardware, messages)
    nodes = hardware.nodes(devices)
    if nodes == 1:
        return ring
    network, share = hardware.network, hardware.efficiency.links
    inside = 2 * gather_or_scatter(size, min(devices, network.node_size), hardware, messages)
    across = 2 * size / (network.node * share) + messages * 2 * math.ceil(math.log2(nodes)) * network.node_latency
    return min(ring, max(inside, across))
