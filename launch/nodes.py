"""Which node of how many this is and where they meet: the options of the command line, checked."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

from configs.errors import UserError

PORT = 29500
TIMEOUT = 300


@dataclass(frozen=True)
class Nodes:
    """`count` nodes of which this is number `rank`; node 0 is reached at `address`:`port`, and all wait `timeout` seconds for one another."""

    count: int = 1
    rank: int = 0
    address: str = ""
    port: int = PORT
    timeout: int = TIMEOUT

    def options(self) -> list[str]:
        """What `accelerate launch` is told; nothing for one node."""
        if self.count == 1:
            return []
        return [
            "--num_machines", str(self.count), "--machine_rank", str(self.rank), "--main_process_ip", self.address,
            "--main_process_port", str(self.port), "--rdzv_conf", f"timeout={self.timeout}",
        ]  # fmt: skip


def add_options(parser: argparse.ArgumentParser) -> None:
    """`--machine`, `--processes` and what a run over several nodes needs."""
    parser.add_argument("--machine", metavar="X", help="machine file: auto, a name (see: align launch show) or a path (default: the config's)")
    parser.add_argument(
        "--processes", type=int, metavar="N", help="processes of all nodes together, as accelerate counts (default: the config's, else one per GPU)"
    )
    group = parser.add_argument_group("several nodes", "the same command on every node, each with its own --node-rank. The working folder, the registry and the data are folders that all nodes share; "
        "what a node's processes share among themselves goes to ALIGN_CACHE (default: SLURM_TMPDIR, else the folder for temporary files), best a local disk")
    group.add_argument("--nodes", type=int, metavar="N", help="number of nodes (default: the machine file's)")
    group.add_argument("--node-rank", type=int, metavar="I", help="which node this is: 0 is the main one")
    group.add_argument("--main-address", metavar="HOST", help="name or address under which the other nodes reach node 0")
    group.add_argument("--main-port", type=int, metavar="N", help=f"a port of node 0 that is free and open to the other nodes (default: {PORT})")
    group.add_argument(
        "--rendezvous-timeout", type=int, default=TIMEOUT, metavar="S", help=f"seconds that the nodes wait for one another (default: {TIMEOUT})"
    )


def nodes_of(args: Any, settings: dict[str, Any], ships: bool) -> Nodes:
    """What the command line says, and where it does not, the machine file (`settings`; `ships`: one of ours, whose address is a stand-in).

    Raises:
        UserError: several nodes without a rank or an address, or a rank, port or timeout that can't be.
    """
    count = args.nodes if args.nodes is not None else int(settings.get("num_machines") or 1)
    if count < 1:
        raise UserError(f"--nodes: found {count}; expected 1 or more")
    given = {"--node-rank": args.node_rank, "--main-address": args.main_address, "--main-port": args.main_port}
    if count == 1:
        unused = [name for name, value in given.items() if value is not None]
        if unused and not (unused == ["--node-rank"] and args.node_rank == 0):
            raise UserError(f"{', '.join(unused)}: only for several nodes; give --nodes too, or leave it out")
        return Nodes(timeout=args.rendezvous_timeout)
    rank, address, port = given.values()
    if not ships:  # a machine file of the person's own, as `accelerate config` writes it on each node
        rank = settings.get("machine_rank") if rank is None else rank
        address, port = address or settings.get("main_process_ip"), port or settings.get("main_process_port")
    if rank is None:
        raise UserError(f"--node-rank is missing: {count} nodes run the same command, each with its own number from 0 to {count - 1}")
    if not 0 <= rank < count:
        raise UserError(f"--node-rank: found {rank}; expected 0 to {count - 1}, for there are {count} nodes")
    if not address:
        raise UserError("--main-address is missing: the name or address under which the other nodes reach node 0 (on node 0: hostname -I)")
    port = PORT if port is None else port
    if not 0 < port < 65536:
        raise UserError(f"--main-port: found {port}; expected 1 to 65535, the same on every node (no port can be chosen for all of them)")
    if args.rendezvous_timeout < 1:
        raise UserError(f"--rendezvous-timeout: found {args.rendezvous_timeout}; expected 1 second or more")
    return Nodes(count, rank, str(address), port, args.rendezvous_timeout)


def per_node(processes: int, nodes: int) -> int:
    """Processes of one node. UserError where the nodes can't have equally many."""
    if processes % nodes:
        raise UserError(
            f"processes: {processes} can't be shared equally by {nodes} nodes; it counts the processes of all nodes: "
            f"give {max(1, processes // nodes) * nodes} or {(processes // nodes + 1) * nodes}"
        )
    return processes // nodes
