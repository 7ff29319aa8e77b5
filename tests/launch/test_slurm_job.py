"""The generated sbatch scripts, run to the end on a cluster of two nodes that are both this machine."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from launch.cli import main
from stages.registry import Registry
from tests.launch.fake_slurm import ROOT, Cluster
from tests.tiny import tiny_data, tiny_model

CHAIN = """
name: tiny
base: base
output: out
max_length: 64
template: plain
split: {validation: 0.1, test: 0.2}
sft: {data: demos.jsonl, train: {epochs: 15, batch_size: 16, micro_batch_size: 8, learning_rate: 1e-3, save_every: 1000, eval_every: 20, log_every: 1}}
dpo: {data: pairs.jsonl, train: {epochs: 1, batch_size: 16, micro_batch_size: 8, learning_rate: 1e-3}}
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Cluster:
    """Both jobs submitted; nothing has run yet."""
    folder = tmp_path_factory.mktemp("slurm")
    tiny_model(folder / "base")
    tiny_data(folder, "mnopqrst")
    (folder / "chain.yaml").write_text(CHAIN)
    cluster = Cluster(folder / "cluster")
    # The jobs find the project as an installed one; here it is the working tree.
    cluster.env["PYTHONPATH"] = str(ROOT)
    before = Path.cwd()
    os.chdir(folder)
    try:
        options = ["--nodes", "2", "--gpus-per-node", "0", "--machine", "cpu_ddp", "--activate", "none", "--cpus-per-node", "1"]
        assert main(["slurm", "chain.yaml", *options, "--out", "jobs", "seed=7"]) == 0
    finally:
        os.chdir(before)
    done = subprocess.run([folder / "jobs" / "submit.sh"], env=cluster.env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["sft.sbatch 1000", "dpo.sbatch 1001"]
    return cluster


def wait_for_steps(folder: Path, job: dict, process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + 120
    while not (folder / "metrics.jsonl").exists() or (folder / "metrics.jsonl").read_text().count("\n") < 2:
        assert process.poll() is None, job["log"].read_text()
        assert time.monotonic() < until, job["log"].read_text()
        time.sleep(0.02)


def test_warned_of_the_time_limit_requeued_continued_and_found_by_the_next_job(cluster):
    folder = cluster.folder.parent
    sft, dpo = cluster.queue()
    assert sft["options"]["nodes"] == "2"
    assert "dependency" not in sft["options"]
    assert dpo["options"]["dependency"] == "afterok:1000"

    process = cluster.start(sft)
    wait_for_steps(folder / "out" / "sft", sft, process)
    process.send_signal(signal.SIGUSR1)
    code = cluster.finish(sft, process)
    log = sft["log"].read_text()
    assert (code, cluster.requeued()) == (85, [1000]), log
    assert "requeued: " in log
    assert "sft stopped because it was told to" in log
    (saved,) = re.findall(r"stopped because it was told to \([^)]+\): saved at step (\d+) of \d+", log)  # no save was due before
    assert not Registry(folder / "out" / "registry").list()

    assert cluster.finish(sft, cluster.start(sft, restarts=1)) == 0, sft["log"].read_text()
    assert not list(cluster.folder.glob("local-*/align-*")), "the nodes' caches are left"
    assert cluster.requeued() == [1000]
    log = sft["log"].read_text()
    assert "sft: continue (was interrupted)" in log
    assert f"resume: continuing from checkpoint-{saved}\n" in log

    assert cluster.finish(dpo, cluster.start(dpo)) == 0, dpo["log"].read_text()
    registry = Registry(folder / "out" / "registry", create=False)
    assert [c.ref for c in registry.list()] == ["dpo/tiny@1", "sft/tiny@1"]
    made = registry.resolve("dpo/tiny")
    assert made.info("processes") == 2
    assert made.info("seed") == 7
    assert {parent["id"] for parent in made.manifest["parents"]} == {registry.resolve("sft/tiny").id}
    # Folders of the job, of its nodes, of their ranks.
    ranks = sorted(path.relative_to(folder / "jobs" / "logs" / "1001").parts[0] for path in (folder / "jobs" / "logs" / "1001").rglob("stderr.log"))
    assert ranks == ["node-0", "node-1"]
    assert "published dpo/tiny@1" in dpo["log"].read_text()
