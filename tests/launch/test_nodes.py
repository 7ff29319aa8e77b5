"""Two nodes train as one machine does, under the machine files that ship; what the nodes do not share is refused."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from configs.machines import machine_file
from stages.registry import Registry
from tests.launch.namespaces import two_machines
from tests.stage.runs import ENVIRONMENT, ROOT, run_apart, settings, weights, workspace

TRAIN = {"max_steps": 6, "micro_batch_size": 2, "learning_rate": 3e-3, "save_every": 3}
TIMEOUT = 60  # seconds for the nodes to meet: two cores, four processes that import torch
TOLERANCE = 1e-4


class Place:
    """A folder both nodes see, the two machines, and how to start something on both at once."""

    def __init__(self, folder, machines):
        self.folder, self.machines = workspace(folder, rows=66), machines
        (folder / "counts").mkdir()

    def write(self, name, **changes):
        values = settings(self.folder, "sft", TRAIN, name=name, output=str(self.folder / f"out-{name}"), **changes)
        (self.folder / f"{name}.json").write_text(json.dumps(values))
        return str(self.folder / f"{name}.json")

    def start(self, node, words, **environment):
        known = {key: value for key, value in ENVIRONMENT.items() if key != "GLOO_SOCKET_IFNAME"}  # nodes find it out
        env = known | {"NODE_WORKER_COUNTS": str(self.folder / "counts"), "ALIGN_RENDEZVOUS_TIMEOUT": str(TIMEOUT)} | environment
        command = [*self.machines.prefixes[node], sys.executable, "-m", *words]
        return subprocess.Popen(command, env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def both(self, words_of, **environment):
        """Start `words_of(node)` on both nodes; [(exit code, output)] of both."""
        nodes = [self.start(node, words_of(node), **environment) for node in (0, 1)]
        try:
            outputs = [node.communicate(timeout=240)[0] for node in nodes]
        finally:
            for node in nodes:
                node.kill()
        return [(node.returncode, output) for node, output in zip(nodes, outputs, strict=True)]

    def losses(self, name):
        rows = [json.loads(line) for line in (self.folder / f"out-{name}" / "metrics.jsonl").read_text().splitlines()]
        return [row[key] for key in ("sft/loss", "sft/eval_loss") for row in rows if key in row]


def free_port():
    with socket.socket() as probe:
        probe.bind(("", 0))
        return str(probe.getsockname()[1])


@pytest.fixture(scope="module")
def place(tmp_path_factory, request):
    with ExitStack() as stack:
        machines = two_machines(stack)
        with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            print(f"\ntests/launch/test_nodes.py: the nodes are {machines.says}")
        yield Place(tmp_path_factory.mktemp("nodes"), machines)


@pytest.fixture(scope="module")
def one(place):
    """What one machine with two processes trains."""
    values = json.loads(Path(place.write("one")).read_text())
    done = run_apart("sft", values, place.folder / "one.json", 2)
    assert done.returncode == 0, done.stderr
    return place.losses("one"), weights(Registry(place.folder / "registry").resolve("sft/one"))


def assert_equal(place, name, one):
    losses, first = one
    assert place.losses(name) == pytest.approx(losses, rel=TOLERANCE)
    assert len(losses) > 6
    published = Registry(place.folder / "registry").list("sft", name)
    assert len(published) == 1, "more than one node published"
    second = weights(published[0])
    assert first.keys() == second.keys()
    assert all(torch.allclose(first[key], second[key], rtol=1e-3, atol=1e-5) for key in first)


def test_two_nodes_of_two_processes_train_as_one_machine_and_each_node_downloads_reads_and_tokenises_once(place, one, tmp_path):
    """Plain `accelerate launch` with cpu_ddp_nodes as it stands, on each node with its own rank."""
    config, port = place.write("ddp"), free_port()

    def words(node):
        machine = ["--config_file", str(machine_file("cpu_ddp_nodes")), "--machine_rank", str(node), "--rdzv_conf", f"timeout={TIMEOUT}"]
        where = ["--main_process_ip", place.machines.address, "--main_process_port", port]
        return ["accelerate.commands.launch", *machine, *where, "-m", "tests.launch.node_worker", "--config", config]

    cache = tmp_path / "cache"
    cache.mkdir()
    for code, output in place.both(words, ALIGN_CACHE=str(cache)):
        assert code == 0, output
    assert_equal(place, "ddp", one)
    calls = Counter(tuple(path.name.split("-")[:3]) for path in (place.folder / "counts").iterdir())
    assert calls == {
        ("read_demonstrations", "0", "0"): 1, ("read_demonstrations", "2", "1"): 1,
        ("snapshot_download", "0", "0"): 1, ("snapshot_download", "2", "1"): 1,
        ("encode_demonstrations", "0", "0"): 3, ("encode_demonstrations", "2", "1"): 3,  # training, validation and test rows
    }  # fmt: skip
    assert list(cache.iterdir()) == [], "what the processes shared is left behind"


def align(place, config, *more, port, timeout=TIMEOUT):
    def words(node):
        nodes = ["--nodes", "2", "--node-rank", str(node), "--main-address", place.machines.address, "--main-port", port]
        return ["launch.cli", "sft", "--config", config, *nodes, "--rendezvous-timeout", str(timeout), *more]

    return words


def test_align_starts_deepspeed_on_two_nodes(place, one):
    """ZeRO-2, one process on each node, through the composed command."""
    results = place.both(align(place, place.write("zero"), "--machine", "cpu_zero2", "--processes", "2", port=free_port()))
    for code, output in results:
        assert code == 0, output
        assert "cpu_zero2_nodes.yaml --num_processes 2 --num_machines 2 --machine_rank" in output
        assert "published sft/zero@1" in output
    assert_equal(place, "zero", one)
    assert {path.name for path in (place.folder / "out-zero" / "logs").iterdir()} == {"sft.log", "sft.node1.log"}


def test_a_chain_over_two_nodes_runs_as_node_0_decides_and_skips_what_is_done(place):
    chain, port = place.folder / "chain.yaml", free_port()
    values = {"name": "chained", "base": str(place.folder / "base"), "output": str(place.folder / "out-chained"), "max_length": 128}
    sections = {"machine": "cpu_ddp", "processes": 2, "sft": {"data": str(place.folder / "sft.jsonl"), "train": {"max_steps": 1, "batch_size": 8, "micro_batch_size": 2}}}
    chain.write_text(json.dumps(values | sections))

    def words(node):
        nodes = ["--nodes", "2", "--node-rank", str(node), "--main-address", place.machines.address, "--main-port", port]
        return ["launch.cli", "run", str(chain), *nodes, "--rendezvous-timeout", str(TIMEOUT)]

    for says in ("sft: done in", "sft: skip"):
        results = place.both(words)
        assert [code for code, _ in results] == [0, 0], results
        assert says in results[0][1]
    assert "sft: " not in results[1][1], "node 1 started what node 0 skipped"
    assert len(Registry(place.folder / "out-chained" / "registry").list("sft", "chained")) == 1


def test_a_registry_that_the_nodes_do_not_share_is_refused_on_both(place, tmp_path):
    """Relative paths, and another working folder on node 1: the config is the same, the folders are not."""
    config = place.write("apart", registry="registry-of-this-node")
    folders = [tmp_path / "node0", tmp_path / "node1"]
    port = free_port()

    def words(node):
        folders[node].mkdir()
        machine = ["--config_file", str(machine_file("cpu_ddp_nodes")), "--num_processes", "2", "--machine_rank", str(node)]
        where = ["--rdzv_conf", f"timeout={TIMEOUT}", "--main_process_ip", place.machines.address, "--main_process_port", port]
        code = f"import os, runpy, sys; os.chdir({str(folders[node])!r}); sys.argv = ['sft', '--config', {config!r}]; runpy.run_module('stages.sft', run_name='__main__')"
        script = folders[node] / "start.py"
        script.write_text(code)
        return ["accelerate.commands.launch", *machine, *where, str(script)]

    results = place.both(words, ALIGN_SHARED_TIMEOUT="0.5")
    assert all(code != 0 for code, _ in results)
    line = next(line for line in results[0][1].splitlines() if line.startswith("error: "))
    assert "node 1 does not see in registry" in line
    assert f"{folders[1]}/registry-of-this-node" in line
    assert "file system that all nodes share" in line
    assert not [path for folder in folders for path in folder.rglob(".seen-*")]
    assert not Registry(folders[0] / "registry-of-this-node").list("sft", "apart")


def test_processes_that_cannot_connect_end_in_time_with_what_to_check(place):
    """Node 1 is told an interface that it does not have; node 0 would wait for it for half an hour."""
    config, port = place.write("wrong"), free_port()
    nodes = []
    for node, interface in ((0, None), (1, "nosuch0")):
        machine = ["--config_file", str(machine_file("cpu_ddp_nodes")), "--num_processes", "2", "--machine_rank", str(node), "--rdzv_conf", f"timeout={TIMEOUT}"]
        where = ["--main_process_ip", place.machines.address, "--main_process_port", port, "-m", "stages.sft", "--config", config]
        environment = {"ALIGN_RENDEZVOUS_TIMEOUT": "15"} | ({"GLOO_SOCKET_IFNAME": interface} if interface else {})
        nodes.append(place.start(node, ["accelerate.commands.launch", *machine, *where], **environment))
    outputs = [node.communicate(timeout=120)[0] for node in nodes]
    assert all(node.returncode for node in nodes)
    for number, output in enumerate(outputs):
        (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
        for part in (f"node {number} of 2", f"{place.machines.address}:{port}", "firewall", "GLOO_SOCKET_IFNAME", "--main-port"):
            assert part in line
    assert "nosuch0" in outputs[1]


def test_nodes_with_other_configs_and_a_main_node_that_is_absent_end_with_one_line(place):
    port = free_port()
    words = [align(place, place.write(name, **changes), port=port) for name, changes in (("same", {}), ("other", {"seed": 7}))]
    results = place.both(lambda node: words[node](node))
    for code, output in results:
        (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
        assert code == 2
        assert "config.seed: 0, 7" in line
        assert "Traceback" not in output
    began = time.monotonic()
    late = place.start(1, align(place, place.write("late"), port=port, timeout=1)(1))
    output = late.communicate(timeout=60)[0]
    assert late.returncode == 2
    assert f"node 1 of 2 could not meet node 0 within 1 s: {place.machines.address}:{port} refuses" in output
    assert "Traceback" not in output
    assert time.monotonic() - began < 30
