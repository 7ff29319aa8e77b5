"""A chain over several nodes: node 0 decides what is skipped, continued or run; the others start each stage when it says so.

Every node runs the same `align run … --nodes N --node-rank I`. Preparations, evaluations and the summary are node 0's alone. The nodes are
joined by the connections of their first meeting (launch/meeting.py); where one breaks, the other side stops too.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from configs.errors import UserError
from launch.chain.steps import stage_of, trains
from launch.command import Command, load_machine, stage_command
from launch.meeting import hear, say
from launch.nodes import Nodes
from launch.process import kill_running, run_child

GONE_SECONDS = 10.0  # that a stage gets to end by itself once a node is gone
CommandOf = Callable[[str, Path, str, int | None], Command]


class Leader:
    """Node 0's side: `connections` to the other nodes by number (none where the chain runs on one)."""

    def __init__(self, nodes: Nodes, connections: dict[int, socket.socket]) -> None:
        self.nodes, self.connections = nodes, connections

    def start(self, stage: str, config: Path, section: Any, key: str) -> None:
        """Have every other node start its processes of a stage (or of a member of a reward ensemble, as reward-2), whose config has been written to `config`.

        Raises:
            UserError: a node has gone.
        """
        order = {"start": stage, "config": str(config), "machine": section.machine, "processes": section.processes, "key": key}
        for number, connection in self.connections.items():
            try:
                connection.settimeout(self.nodes.timeout)
                say(connection, order)
            except OSError as error:
                raise UserError(f"node {number} of {self.nodes.count} has gone ({error}); look at its log and start the chain again on all nodes") from error

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """While a stage runs: stop it when another node is gone."""
        done = threading.Event()
        watch = threading.Thread(target=self._watch, args=(done,), daemon=True)
        watch.start()
        try:
            yield
        finally:
            done.set()
            watch.join()

    def _watch(self, done: threading.Event) -> None:
        while self.connections and not done.wait(0.5):
            gone = [number for number, connection in self.connections.items() if has_gone(connection)]
            if gone and not done.is_set():
                stop(f"node(s) {', '.join(map(str, gone))} of {self.nodes.count} have gone")
                return

    def ended(self, stage: str) -> None:
        """Wait until every other node's processes of the stage have ended, and tell of those that did not end well."""
        for number, connection in self.connections.items():
            try:
                connection.settimeout(self.nodes.timeout)
                code = hear(connection).get("ended")
            except (OSError, ValueError):
                code = None
            if code:
                print(f"warning: {stage} ended with exit code {code} on node {number}; see the logs there", file=sys.stderr)
            elif code is None:
                print(f"warning: node {number} has gone, or did not say within {self.nodes.timeout} s how {stage} ended there", file=sys.stderr)

    def close(self, code: int) -> None:
        """The chain has ended with this exit code here; the other nodes end with it too."""
        for connection in self.connections.values():
            with contextlib.suppress(OSError):
                say(connection, {"end": code})
            connection.close()


class Follower:
    """Another node's side: starts what node 0 says until that ends the chain."""

    def __init__(self, nodes: Nodes, connection: socket.socket, logs: Path, command_of: CommandOf | None = None, quiet: bool = False) -> None:
        self.nodes, self.connection, self.logs, self.quiet = nodes, connection, logs, quiet
        self.command_of = command_of or self._command

    def run(self) -> int:
        """The exit code of the chain. Raises UserError where node 0 has gone."""
        while True:
            self.connection.settimeout(None)  # node 0 may prepare or evaluate for hours
            try:
                order = hear(self.connection)
            except (OSError, ValueError) as error:
                raise UserError(f"node {self.nodes.rank}: the connection to node 0 broke ({error}); see the chain's log there") from error
            if "end" in order:
                return int(order["end"])
            if not trains(order.get("start")):
                raise UserError(f"node {self.nodes.rank}: node 0 has gone before the chain ended; see its log, then start the chain again on all nodes")
            code = self._start(order)
            with contextlib.suppress(OSError):
                say(self.connection, {"ended": code})

    def _start(self, order: dict[str, Any]) -> int:
        stage, config = order["start"], Path(order["config"])
        log = self.logs / f"{stage}.node{self.nodes.rank}.log"
        command = self.command_of(stage, config, order["machine"], order["processes"])
        print(f"{stage}: {command.typed}", file=sys.stderr if self.quiet else sys.stdout, flush=True)
        env = command.environment(ALIGN_INPUTS_KEY=order["key"], ALIGN_RENDEZVOUS_TIMEOUT=str(self.nodes.timeout))
        done = threading.Event()
        watch = threading.Thread(target=self._watch, args=(done,), daemon=True)
        watch.start()
        outcome = run_child(command.argv, env, log, prefix=stage, to_stderr=self.quiet)
        done.set()
        watch.join()
        return 130 if outcome.interrupted and not outcome.code else outcome.code

    def _command(self, stage: str, config: Path, machine: str, processes: int | None) -> Command:
        return stage_command(f"stages.{stage_of(stage)}", config, load_machine(machine, processes, self.nodes.count), processes, self.nodes)

    def _watch(self, done: threading.Event) -> None:
        """While a stage runs: stop it when node 0 is gone, whose processes it would wait for."""
        while not done.wait(0.5):
            if has_gone(self.connection):
                stop(f"node {self.nodes.rank}: node 0 has gone")
                return


def has_gone(connection: socket.socket) -> bool:
    """Whether the other side has closed, or is found to be unreachable (keep-alive, reset); what it has said stays to be heard."""
    try:
        return not connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except OSError:
        return True


def stop(why: str) -> None:
    """Stop the stage that runs here, whose processes would wait for those of a node that has gone: they cannot agree on a step to save after."""
    print(f"error: {why}; stopping", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)  # run_child passes it on
    last = threading.Timer(GONE_SECONDS, kill_running)
    last.daemon = True
    last.start()
