"""Which node this process is on and which of that node's processes it is, as the launcher set it; one node without a launcher."""

from __future__ import annotations

import os

ADVICE = (
    "check that every node runs the same command with the same --main-address and --main-port and its own --node-rank, that no firewall closes "
    "that port or the ports above 1024 between the nodes, and that the network interface is right (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME: see ip address)"
)


def node_count() -> int:
    """Nodes of this run."""
    return int(os.environ.get("GROUP_WORLD_SIZE", "1"))


def node_rank() -> int:
    """Number of this node; 0 publishes."""
    return int(os.environ.get("GROUP_RANK", "0"))


def local_rank() -> int:
    """Number of this process on its node; 0 does what is done once per node."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """Processes of this node."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def first_rank(node: int) -> int:
    """Rank of a node's first process; every node has equally many."""
    return node * local_world_size()


def main_address() -> str:
    """HOST:PORT where the nodes meet."""
    return f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"


def timeout() -> float:
    """Seconds that nodes wait for one another while they join; ALIGN_RENDEZVOUS_TIMEOUT, which align sets."""
    return float(os.environ.get("ALIGN_RENDEZVOUS_TIMEOUT", "300"))
