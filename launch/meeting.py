"""The nodes of a run meet before any of them starts processes: who is missing, unreachable or different is told in one line.

Torch's launcher waits ten minutes for a node that is missing and ends in a traceback, on every node another one. Here node 0
listens at --main-port until every other node has said what it is about to start, one JSON line each; then all are told to go, and
`accelerate launch` uses the same port. Nothing is sent but the config and versions, and nothing that comes in is run.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from typing import Any

from configs.errors import UserError
from launch.nodes import Nodes

PATIENCE = 5.0  # seconds for one connection or one line
RETRY = 0.25
LONGEST = 1 << 20  # bytes of a line
PACKAGES = ("torch", "accelerate", "transformers", "trl", "deepspeed")


def meet(nodes: Nodes, about: dict[str, Any]) -> None:
    """Return when every node is here with the same `about` (JSON: what is started, with which config and versions).

    Raises:
        UserError: as `connect` does.
    """
    for connection in connect(nodes, about).values():
        connection.close()


def connect(nodes: Nodes, about: dict[str, Any]) -> dict[int, socket.socket]:
    """As `meet`, and the connections stay: on node 0 one to each other node, by number, elsewhere the one to node 0; none for one node.

    The port is free again for others to listen on.

    Raises:
        UserError: on this node, after at most `nodes.timeout` seconds: the port is taken, the main address does not resolve or does not answer, a
            node did not come, came twice, or is about to start something else.
    """
    if nodes.count == 1:
        return {}
    found = _lead(nodes, about) if nodes.rank == 0 else {0: _follow(nodes, about)}
    for connection in found.values():
        _keep_alive(connection)
    return found


def _keep_alive(connection: socket.socket) -> None:
    """Have the kernel notice within minutes that the other machine is gone without a word (power, network)."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 20), ("TCP_KEEPCNT", 6)):
        if hasattr(socket, option):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def versions() -> dict[str, str | None]:
    """Versions that must be the same on every node; None where a package is not installed."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    found: dict[str, str | None] = {"python": ".".join(platform.python_version_tuple()[:2])}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def _lead(nodes: Nodes, about: dict[str, Any]) -> dict[int, socket.socket]:
    until = time.monotonic() + nodes.timeout
    arrived: dict[int, socket.socket] = {}
    with _listen(nodes) as listener:
        try:
            _reach_oneself(nodes, until)
            while len(arrived) < nodes.count - 1:
                listener.settimeout(max(0.01, until - time.monotonic()))
                try:
                    connection, peer = listener.accept()
                except TimeoutError:
                    raise UserError(_missing(nodes, arrived)) from None
                _admit(connection, str(peer[0]), nodes, about, arrived)
        except UserError as error:
            for connection in arrived.values():
                _refuse(connection, str(error))
            raise
    for connection in arrived.values():
        with contextlib.suppress(OSError):  # one that has gone meanwhile is missed by those who need it
            say(connection, {"go": True})
    return arrived


def _listen(nodes: Nodes) -> socket.socket:
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", nodes.port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=nodes.count)
    except OSError:
        pass  # a machine without IPv6; a port that is taken fails again below
    try:
        return socket.create_server(("", nodes.port), backlog=nodes.count)
    except OSError as error:
        raise UserError(
            f"port {nodes.port} of node 0 can't be listened on ({os.strerror(error.errno or 0)}): another program, or an earlier run, has it; "
            "end that (ss -ltnp shows which) or give all nodes another --main-port"
        ) from error


def _reach_oneself(nodes: Nodes, until: float) -> None:
    """Node 0's own processes will go through the main address as well."""
    while True:
        try:
            socket.create_connection((nodes.address, nodes.port), timeout=PATIENCE).close()
            return
        except OSError as error:
            if time.monotonic() >= until or not isinstance(error, socket.gaierror):
                raise UserError(_unreachable(nodes, error, "node 0 listens there itself, so this is not its address")) from error
        time.sleep(RETRY)


def _admit(connection: socket.socket, peer: str, nodes: Nodes, about: dict[str, Any], arrived: dict[int, socket.socket]) -> None:
    """Take in one node; whoever says nothing, or nothing of ours, is sent away."""
    connection.settimeout(PATIENCE)
    try:
        hello = hear(connection)
        number, count, theirs = int(hello["node"]), int(hello["nodes"]), hello["about"]
    except (OSError, ValueError, KeyError, TypeError):
        connection.close()
        return
    problem = None
    if count != nodes.count:
        problem = f"the node at {peer} was told --nodes {count}, node 0 --nodes {nodes.count}; give all nodes the same"
    elif number == 0 or number in arrived:
        problem = f"two nodes were told --node-rank {number} (one of them at {peer}); every node has its own, from 0 to {nodes.count - 1}"
    else:
        from stages.nodes.agree import different

        if differences := different(about, theirs):
            problem = f"node {number} (at {peer}) is about to start something else than node 0: {'; '.join(differences)} (node 0's value first); give all nodes the same"
    if problem:
        _refuse(connection, problem)
        raise UserError(problem)
    arrived[number] = connection


def _follow(nodes: Nodes, about: dict[str, Any]) -> socket.socket:
    until = time.monotonic() + nodes.timeout
    hello = {"node": nodes.rank, "nodes": nodes.count, "about": about}
    while True:
        connection = None
        try:
            left = max(0.05, until - time.monotonic())
            connection = socket.create_connection((nodes.address, nodes.port), timeout=min(PATIENCE, left))
            connection.settimeout(left + PATIENCE)  # node 0's own time may end a little later, and its reason is the better one
            say(connection, hello)
            answer = hear(connection)
            if answer and "error" not in answer:
                return connection
            connection.close()
            if answer:
                raise UserError(f"{answer['error']} (told by node 0 at {nodes.address}:{nodes.port})")
            problem: Exception = ConnectionError("closed without an answer")
        except ValueError as error:
            raise UserError(_unreachable(nodes, error, "another program answers there")) from error
        except OSError as error:
            problem = error
        if connection is not None:
            connection.close()
        if time.monotonic() >= until:
            raise UserError(_unreachable(nodes, problem)) from problem
        time.sleep(RETRY)


def hear(connection: socket.socket) -> dict[str, Any]:
    """One JSON object from the other side; empty where it has gone. ValueError for what is no JSON object, OSError after the timeout."""
    text = b""
    while not text.endswith(b"\n") and len(text) < LONGEST:
        piece = connection.recv(1)  # byte by byte: what follows the line belongs to who reads next
        if not piece:
            break
        text += piece
    try:
        found = json.loads(text) if text else {}
    except RecursionError:
        raise ValueError("expected an object, found brackets without end") from None
    if not isinstance(found, dict):
        raise ValueError(f"expected an object, found {type(found).__name__}")
    return found


def say(connection: socket.socket, message: dict[str, Any]) -> None:
    """Send one JSON object. OSError where the other side has gone."""
    connection.sendall(json.dumps(message).encode() + b"\n")


def _refuse(connection: socket.socket, problem: str) -> None:
    """Tell a node why, and wait until it has read that."""
    with contextlib.suppress(OSError):
        connection.settimeout(PATIENCE)
        say(connection, {"error": problem})
        connection.shutdown(socket.SHUT_WR)
        connection.recv(1)
    connection.close()


def _missing(nodes: Nodes, arrived: dict[int, Any]) -> str:
    absent = ", ".join(str(number) for number in range(1, nodes.count) if number not in arrived)
    return (
        f"node(s) {absent} of {nodes.count} did not come to {nodes.address}:{nodes.port} within {nodes.timeout} s: start the same command there with "
        f"--node-rank; {CHECK.format(port=nodes.port)}"
    )


CHECK = (
    "check that no firewall closes port {port}, that --main-address and --main-port are the same on every node, and that the address belongs to the "
    "network interface that leads to the other nodes (ip address; GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME choose one)"
)


def _unreachable(nodes: Nodes, error: Exception, known: str = "") -> str:
    place = f"{nodes.address}:{nodes.port}"
    if isinstance(error, socket.gaierror):
        why = f"{nodes.address} is no name that node {nodes.rank} can resolve ({error.strerror}); give node 0's IP address, or mend DNS or /etc/hosts"
    elif isinstance(error, ConnectionRefusedError):
        why = f"{place} refuses: the host is there, but nothing listens on port {nodes.port}; is node 0 started, with the same --main-port?"
    elif isinstance(error, TimeoutError):
        why = f"{place} does not answer: wrong host, host down, or a firewall"
    else:
        why = f"{place}: {error}"
    return f"node {nodes.rank} of {nodes.count} could not meet node 0 within {nodes.timeout} s: {why}{'; ' + known if known else ''}; {CHECK.format(port=nodes.port)}"
