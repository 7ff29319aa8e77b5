"""Nodes that meet before they start, and what they agree on: every failure ends in time with one line that says what to check."""

from __future__ import annotations

import json
import socket
import threading
import time
from pathlib import Path

import pytest

from configs.errors import UserError
from launch.meeting import meet, versions
from launch.nodes import Nodes
from stages.nodes import agree, interface, once
from stages.nodes.place import first_rank, local_world_size, node_count

ABOUT = {"stage": "sft", "processes": 4, "config": {"seed": 0, "train": {"epochs": 1.0}}}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def gather(port: int, *nodes: Nodes, abouts: dict[int, dict] | None = None) -> list[str]:
    """Each node's `meet` in a thread of its own; what each ended with, "" for go."""
    ends = [""] * len(nodes)

    def one(index: int) -> None:
        try:
            meet(nodes[index], (abouts or {}).get(index, ABOUT))
        except UserError as error:
            ends[index] = str(error)

    threads = [threading.Thread(target=one, args=(index,)) for index in range(len(nodes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert not any(thread.is_alive() for thread in threads)
    return ends


def of(count: int, port: int, timeout: int = 20, address: str = "127.0.0.1") -> list[Nodes]:
    return [Nodes(count, rank, address, port, timeout) for rank in range(count)]


def test_three_nodes_meet_whoever_comes_first_and_leave_the_port_free():
    port = free_port()
    assert gather(port, *reversed(of(3, port))) == ["", "", ""]
    for _ in range(2):  # at once again: no socket is left behind that would keep accelerate launch from the port
        assert gather(port, *of(3, port)) == ["", "", ""]


def test_one_node_has_no_one_to_meet():
    assert meet(Nodes(), ABOUT) is None


def check_line(line: str, *parts: str) -> None:
    """One line that names all of `parts`, the firewall and the interface variables."""
    assert "\n" not in line
    for part in (*parts, "firewall", "GLOO_SOCKET_IFNAME", "--main-port"):
        assert part in line, f"{part!r} is not in: {line}"


def test_a_node_that_does_not_come_is_named_on_node_0_and_told_to_those_that_came():
    port = free_port()
    began = time.monotonic()
    first, second = gather(port, *of(3, port, timeout=1)[:2])
    assert time.monotonic() - began < 10
    check_line(first, f"node(s) 2 of 3 did not come to 127.0.0.1:{port} within 1 s", "start the same command")
    assert second.startswith(first)
    assert "told by node 0" in second


def test_a_main_node_that_is_absent():
    port = free_port()
    began = time.monotonic()
    (line,) = gather(port, of(2, port, timeout=1)[1])
    assert 0.9 < time.monotonic() - began < 10
    check_line(line, f"127.0.0.1:{port} refuses", "is node 0 started", "within 1 s", "node 1 of 2")


def test_a_name_that_does_not_resolve_on_either_side():
    for rank in (0, 1):
        port = free_port()
        (line,) = gather(port, Nodes(2, rank, "no-such-host.invalid", port, 1))
        check_line(line, "no-such-host.invalid is no name that node", f"node {rank} of 2", "give node 0's IP address")


def test_node_0_with_an_address_that_is_not_its_own(monkeypatch):
    """203.0.113.0/24 is for documentation (RFC 5737): nobody has it."""
    monkeypatch.setattr("launch.meeting.PATIENCE", 0.3)
    port = free_port()
    (line,) = gather(port, Nodes(2, 0, "203.0.113.7", port, 1))
    check_line(line, f"203.0.113.7:{port}", "this is not its address")


def test_a_port_that_is_taken():
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        (line,) = gather(port, of(2, port, timeout=5)[0])
    assert f"port {port} of node 0 can't be listened on (Address already in use)" in line
    assert "--main-port" in line


def test_a_program_at_the_port_that_is_none_of_ours():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]

        def answer() -> None:
            connection, _ = other.accept()
            connection.recv(10000)
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            connection.close()

        threading.Thread(target=answer, daemon=True).start()
        (line,) = gather(port, of(2, port, timeout=2)[1])
    check_line(line, "another program answers there", f"127.0.0.1:{port}")


def test_a_host_that_takes_connections_and_never_answers(monkeypatch):
    monkeypatch.setattr("launch.meeting.PATIENCE", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        (line,) = gather(port, of(2, port, timeout=1)[1])
    check_line(line, f"127.0.0.1:{port} does not answer", "firewall")


def test_strangers_are_sent_away(monkeypatch):
    monkeypatch.setattr("launch.meeting.PATIENCE", 0.3)
    port = free_port()

    def bother() -> None:
        for text in (b"GET / HTTP/1.1\r\n\r\n", b'{"node": "x"}\n', b'[1]\n', b""):
            with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
                connection.sendall(text)

    leader, follower = of(2, port)
    ends: list[str] = []
    thread = threading.Thread(target=lambda: ends.extend(gather(port, leader)))
    thread.start()
    time.sleep(0.3)
    bother()
    assert gather(port, follower) == [""]
    thread.join(timeout=20)
    assert ends == [""]


def test_nodes_that_were_told_other_things_are_refused_on_both():
    port = free_port()
    ends = gather(port, *of(2, port), abouts={1: ABOUT | {"config": {"seed": 0, "train": {"epochs": 2.0}}, "processes": 8}})
    assert all("node 1 (at 127.0.0.1)" in end or "127.0.0.1" in end for end in ends)
    assert all("processes: 4, 8; config.train.epochs: 1.0, 2.0" in end for end in ends)
    port = free_port()
    assert all("--nodes 3, node 0 --nodes 2" in end for end in gather(port, of(2, port)[0], of(3, port)[1]))
    port = free_port()
    ends = gather(port, of(3, port)[0], of(3, port)[1], of(3, port)[1])
    assert all("two nodes were told --node-rank 1" in end for end in ends)


def test_versions_are_those_installed():
    import torch

    assert versions()["torch"] == torch.__version__.partition("+")[0] or versions()["torch"] == torch.__version__
    assert versions()["accelerate"]


# What nodes agree on -----------------------------------------------------------------------------------------------


def test_differences_are_named_by_key():
    assert agree.different({"a": {"b": 1, "c": [1]}, "d": None}, {"a": {"b": 2, "c": [1]}, "e": 3}) == ["a.b: 1, 2", "e: None, 3"]


def test_a_file_that_comes_late_is_seen_and_one_that_never_comes_is_not(tmp_path, monkeypatch):
    monkeypatch.setenv("ALIGN_SHARED_TIMEOUT", "0.3")
    assert not agree.appears(tmp_path / "f", "x")
    monkeypatch.setenv("ALIGN_SHARED_TIMEOUT", "20")
    timer = threading.Timer(0.2, (tmp_path / "f").write_text, ["x"])
    timer.start()
    assert agree.appears(tmp_path / "f", "x")
    monkeypatch.setenv("ALIGN_SHARED_TIMEOUT", "0")
    assert not agree.appears(tmp_path / "f", "another content")


def test_the_signature_of_a_model_folder(tmp_path):
    assert agree.signature(tmp_path / "none") is None
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "a.safetensors").write_bytes(b"123")
    before = agree.signature(tmp_path)
    (tmp_path / "config.json").write_text("[]")  # of equal size
    assert agree.signature(tmp_path) != before
    (tmp_path / "config.json").write_text("{}")
    assert agree.signature(tmp_path) == before
    (tmp_path / "a.safetensors").write_bytes(b"1234")
    assert agree.signature(tmp_path) != before


def test_one_node_needs_no_agreement(tmp_path):
    assert node_count() == local_world_size() == 1
    assert first_rank(0) == 0
    assert agree.same_config(lambda: "cfg") == "cfg"
    agree.check_shared({"registry": tmp_path / "new"})
    assert not (tmp_path / "new").exists()
    agree.check_same_models(["nowhere"])
    agree.check_published(tmp_path, "sft/x@1", "id")


def test_one_process_calls_the_function_itself_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path))
    rows = object()
    assert once.once_per_node("tokenising", lambda: rows, node_0_first=True) is rows
    with pytest.raises(ZeroDivisionError):
        once.once_per_node("tokenising", lambda: 1 // 0)
    assert list(tmp_path.iterdir()) == []


def test_the_cache_is_the_jobs_folder_unless_it_is_set(monkeypatch):
    monkeypatch.delenv("ALIGN_CACHE", raising=False)
    monkeypatch.setenv("SLURM_TMPDIR", "/job")
    assert once.cache_folder() == Path("/job")
    monkeypatch.setenv("ALIGN_CACHE", "/mine")
    assert once.cache_folder() == Path("/mine")


@pytest.mark.parametrize(
    ("node", "addresses", "preset", "chosen"),
    [
        (0, ["127.0.1.1", "10.0.0.2"], None, "eth-to-10.0.0.2"),  # Debian's /etc/hosts: node 0's own name is its loopback
        (1, ["127.0.1.1", "10.0.0.2"], None, "eth-of-10.0.0.2"),
        (0, ["10.0.0.1", "10.0.0.2"], None, "eth-to-10.0.0.2"),
        (1, ["127.0.0.1", "127.0.0.1"], None, "eth-of-127.0.0.1"),  # two "nodes" on one machine
        (1, ["127.0.1.1", "10.0.0.2"], "ib0", "ib0"),
    ],
)
def test_the_interface_is_the_one_that_leads_to_another_node(monkeypatch, node, addresses, preset, chosen):
    from stages.nodes import join

    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("MASTER_ADDR", "n0")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", preset or "")
    monkeypatch.setenv("GROUP_RANK", str(node))
    monkeypatch.setattr(join, "exchange", lambda mine: addresses)
    monkeypatch.setattr(join, "own_address", lambda host: f"to-{host}" if host.startswith("10.") else "own")
    monkeypatch.setattr(join, "interface_of", lambda address: f"eth-{address}" if address.startswith("to-") else f"eth-of-{address}")
    if node:  # on node 1 the way to node 0's loopback would be its own
        monkeypatch.setattr(join, "own_address", lambda host: None)
    join.choose_interface()
    assert join.os.environ["GLOO_SOCKET_IFNAME"] == chosen


def test_the_interface_towards_this_machine_is_its_loopback():
    address = interface.own_address("127.0.0.1")
    assert address is not None
    assert interface.is_loopback(address)
    assert interface.interface_of(address) == interface.interface_of("127.0.0.2")
    assert interface.own_address("no-such-host.invalid") is None
    assert interface.interface_of("203.0.113.7") is None
    assert json.dumps(interface.interface_of("127.0.0.1")) in ('"lo"', '"lo0"')
