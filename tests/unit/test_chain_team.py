"""A chain over nodes: the others start what node 0 says, end as it ends, and stop when it is gone."""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from configs.errors import UserError
from launch.chain.team import Follower, Leader, has_gone
from launch.command import Command
from launch.meeting import hear, say
from launch.nodes import Nodes

ROOT = Path(__file__).parents[2]
NODES = Nodes(2, 1, "n0", 29500, 5)
SECTION = SimpleNamespace(machine="zero3", processes=8)


def python(code: str) -> Command:
    return Command((sys.executable, "-c", code), "typed", {})


@pytest.fixture
def pair():
    """Node 0's end and node 1's end of their connection."""
    first, second = socket.socketpair()
    yield first, second
    first.close()
    second.close()


def follow(second, tmp_path, command_of):
    """Node 1 in a thread; (thread, list that will hold its exit code or error)."""
    ends: list = []

    def run():
        try:
            ends.append(Follower(NODES, second, tmp_path, command_of).run())
        except UserError as error:
            ends.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    return thread, ends


def test_a_follower_starts_each_stage_as_told_and_ends_with_the_chain(pair, tmp_path, capfd):
    told = []

    def command_of(*order):
        told.append(order)
        return python(f"import os, sys; print(os.environ['ALIGN_INPUTS_KEY']); sys.exit({3 if order[0] == 'ppo' else 0})")

    thread, ends = follow(pair[1], tmp_path, command_of)
    leader = Leader(NODES, {1: pair[0]})
    for stage in ("reward-2", "ppo"):
        leader.start(stage, Path(f"{stage}.yaml"), SECTION, f"key of {stage}")
        leader.ended(stage)
    leader.close(7)
    thread.join(timeout=20)
    assert ends == [7]
    assert told == [("reward-2", Path("reward-2.yaml"), "zero3", 8), ("ppo", Path("ppo.yaml"), "zero3", 8)]
    assert "key of ppo" in (tmp_path / "ppo.node1.log").read_text()
    err = capfd.readouterr().err
    assert "warning: ppo ended with exit code 3 on node 1" in err
    assert "reward-2 ended" not in err


def test_the_command_of_a_follower_is_that_of_its_own_rank(pair, tmp_path):
    typed = Follower(NODES, pair[1], tmp_path)._command("sft", Path("c.yaml"), "cpu_zero3", 4).typed
    assert "cpu_zero3_nodes.yaml --num_processes 4 --num_machines 2 --machine_rank 1 --main_process_ip n0" in typed
    assert "-m stages.reward " in Follower(NODES, pair[1], tmp_path)._command("reward-2", Path("c.yaml"), "cpu_ddp", 2).typed


def test_a_leader_that_goes_between_two_stages_is_an_error(pair, tmp_path):
    thread, ends = follow(pair[1], tmp_path, None)
    pair[0].close()
    thread.join(timeout=20)
    assert "node 1: node 0 has gone before the chain ended" in ends[0]


def test_nothing_but_a_stage_is_started(pair, tmp_path):
    thread, ends = follow(pair[1], tmp_path, lambda *_: pytest.fail("started"))
    say(pair[0], {"start": "os", "config": "x", "machine": "cpu", "processes": 1, "key": ""})
    thread.join(timeout=20)
    assert "node 0 has gone" in ends[0]


def test_a_follower_that_is_gone_stops_the_chain_before_the_next_stage(pair, capsys):
    pair[1].close()
    leader = Leader(NODES, {1: pair[0]})
    with pytest.raises(UserError, match="node 1 of 2 has gone"):
        leader.start("sft", Path("c"), SECTION, "")
    leader.ended("sft")
    assert "node 1 has gone" in capsys.readouterr().err
    leader.close(2)


def test_a_follower_whose_leader_dies_stops_its_stage(tmp_path):
    """It would otherwise wait for the leader's processes, with NCCL for ten minutes."""
    code = (
        "import socket, sys\nfrom pathlib import Path\nfrom launch.chain.team import Follower\nfrom launch.command import Command\nfrom launch.nodes import Nodes\n"
        "connection = socket.socket(fileno=int(sys.argv[1]))\n"
        "child = Command((sys.executable, '-c', 'import time; print(1, flush=True); time.sleep(60)'), 'typed', {})\n"
        "try: Follower(Nodes(2, 1, 'n0', 1, 5), connection, Path(sys.argv[2]), lambda *_: child).run()\n"
        "except Exception as error: print(error)"
    )
    first, second = socket.socketpair()
    os.set_inheritable(second.fileno(), True)
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(second.fileno()), str(tmp_path)], cwd=ROOT, close_fds=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )  # fmt: skip
    second.close()
    say(first, {"start": "sft", "config": "x", "machine": "cpu", "processes": 1, "key": ""})
    log = tmp_path / "sft.node1.log"
    until = time.monotonic() + 20
    while not (log.exists() and log.read_text().endswith("1\n")) and time.monotonic() < until:
        time.sleep(0.05)
    first.shutdown(socket.SHUT_RDWR)
    first.close()
    began = time.monotonic()
    output = process.communicate(timeout=30)[0]
    assert time.monotonic() - began < 15
    assert "error: node 1: node 0 has gone; stopping" in output


@pytest.fixture
def reset():
    """A connection whose other side was lost, not closed: reading from it is an error."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        first = socket.create_connection(listener.getsockname())
        second, _ = listener.accept()
    first.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    first.close()
    with second:
        yield second


def test_a_connection_that_is_lost_is_noticed_as_one_that_is_closed(pair, reset):
    assert has_gone(reset)
    assert not has_gone(pair[0])
    say(pair[1], {"ended": 0})
    pair[1].close()
    assert not has_gone(pair[0])  # it has said something first
    assert hear(pair[0]) == {"ended": 0}
    assert has_gone(pair[0])


def test_a_leader_stops_its_stage_when_another_node_is_lost(pair, reset, capsys):
    told = []
    before = signal.signal(signal.SIGTERM, lambda *_: told.append("stopped"))
    try:
        with Leader(Nodes(3, 0, "n0", 1, 5), {1: pair[0], 2: reset}).watching():
            until = time.monotonic() + 10
            while not told and time.monotonic() < until:
                time.sleep(0.05)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert told == ["stopped"]
    assert "error: node(s) 2 of 3 have gone; stopping" in capsys.readouterr().err


def test_lines_are_read_one_by_one(pair):
    say(pair[0], {"a": 1})
    say(pair[0], {"b": json.dumps({"c": "\n"})})
    pair[0].close()
    assert hear(pair[1]) == {"a": 1}
    assert hear(pair[1]) == {"b": '{"c": "\\n"}'}
    assert hear(pair[1]) == {}
