"""Joining the other nodes: through the right network interface, within a stated time, with one clear error where it fails."""

from __future__ import annotations

import os
import sys
import threading
from datetime import timedelta
from typing import Any

from configs.errors import UserError
from stages.nodes.interface import interface_of, is_loopback, own_address
from stages.nodes.place import ADVICE, local_rank, main_address, node_count, node_rank, timeout

VARIABLE = "GLOO_SOCKET_IFNAME"


def join() -> None:
    """Join the process group with every other process; returns at once on one node.

    Gloo announces the address that the host's name resolves to, which on many machines is 127.0.0.1, where no other node finds it.
    So each node is told which interface leads to the others, unless the person has set GLOO_SOCKET_IFNAME.

    Raises:
        UserError: the processes did not meet within the time, or could not connect to one another.
    """
    if node_count() == 1:
        return
    from stages.training.ranks import process_group, wait_for_everyone

    choose_interface()
    watchdog = threading.Timer(timeout(), give_up)
    watchdog.daemon = True
    watchdog.start()
    try:
        process_group()
        wait_for_everyone()
    except RuntimeError as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"{failed()}: {first}; {ADVICE}") from error
    finally:
        watchdog.cancel()


def failed() -> str:
    """How an error about joining begins: which node, where to, through what."""
    return (
        f"node {node_rank()} of {node_count()} met at {main_address()} but could not connect to the other processes "
        f"(network interface {os.environ.get(VARIABLE, 'not set')})"
    )


def give_up() -> None:
    """End this process with the error of a time that has run out; called while the process itself hangs in a library."""
    print(f"error: {failed()} within {timeout():g} s; {ADVICE}", file=sys.stderr, flush=True)
    os._exit(2)


def choose_interface() -> None:
    """Set GLOO_SOCKET_IFNAME to the interface towards the other nodes, unless it is set or nothing is known of them.

    A node where it is set tells its address all the same: it may not be set on the others.

    Raises:
        UserError: a node did not come within the time.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    addresses = exchange(own_address(os.environ["MASTER_ADDR"]) or "")
    others = [address for number, address in enumerate(addresses) if number != node_rank()]
    mine = addresses[node_rank()]
    for other in others:  # node 0's own name may mean its loopback: the way to another node is the way out
        if other and not is_loopback(other):
            mine = own_address(other) or mine
    name = interface_of(mine) if mine else None
    if name and not os.environ.get(VARIABLE):
        os.environ[VARIABLE] = name


def exchange(value: str) -> list[str]:
    """One text of each node, in order; through the launcher's store, before there is a process group.

    Raises:
        UserError: the store can't be reached, or a node does not answer in time.
    """
    store: Any = None
    told: list[str] = []
    try:
        store = _store()
        if local_rank() == 0:
            store.set(f"align/join/{node_rank()}", value)
        for number in range(node_count()):
            told.append(store.get(f"align/join/{number}").decode())
    except RuntimeError as error:
        what = f"node {len(told)} of {node_count()} did not come" if store is not None else "the main node's store can't be reached"
        raise UserError(f"{what} at {main_address()} within {timeout():g} s; {ADVICE}") from error
    return told


def _store() -> Any:
    from torch.distributed import TCPStore

    return TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=timedelta(seconds=timeout()), wait_for_workers=False
    )
