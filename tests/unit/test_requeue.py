"""The exit code of a run that was told to stop: how it is told from failures, and who may take over its working folder."""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path

import pytest

from configs.exit_codes import HANG, REQUEUE
from launch.command import Machine, stage_command
from launch.process import run_child
from stages.claim import identity, is_alive
from stages.training import stop

WARNED = "import signal, sys, time\nsignal.signal(signal.SIGUSR1, lambda *_: sys.exit({}))\nprint('ready', flush=True)\ntime.sleep(60)"


def child(code: str, tmp_path: Path, **options) -> int:
    return run_child([sys.executable, "-c", code], dict(os.environ), tmp_path / "log", **options).code


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (f"import sys; sys.exit({REQUEUE})", REQUEUE),
        (f"import sys; print('  exitcode  : {REQUEUE} (pid: 7)'); sys.exit(1)", REQUEUE),  # how torch's agent tells a worker's code
        (f"import sys; print('  exitcode  : {HANG} (pid: 7)'); print('  exitcode  : -9 (pid: 8)'); sys.exit(1)", HANG),
        (f"import sys; sys.exit({HANG})", HANG),
        (f"import sys; print('{stop.STOPPED} (SIGTERM): saved at step 3 of 9'); sys.exit(1)", REQUEUE),  # the agent was told, and has no code for it
        ("import sys; print('  exitcode  : 3 (pid: 7)'); sys.exit(1)", 1),
    ],
)
def test_a_process_or_a_worker_that_asks_for_it(tmp_path, code, expected):
    assert child(code, tmp_path) == expected


@pytest.mark.parametrize(("ends", "expected"), [(0, 0), (1, REQUEUE), (143, REQUEUE), (2, 2), (3, 3)])
def test_a_terminated_process_is_to_be_run_again_where_that_is_what_ended_it(tmp_path, ends, expected):
    def terminate(line: str) -> None:
        if line == "ready":
            threading.Thread(target=os.kill, args=(os.getpid(), signal.SIGTERM)).start()

    assert child(WARNED.replace("SIGUSR1", "SIGTERM").format(ends), tmp_path, on_line=terminate) == expected


@pytest.mark.parametrize(("ends", "expected"), [(0, 0), (1, REQUEUE), (2, 2), (REQUEUE, REQUEUE)])
def test_a_warned_process_is_to_be_run_again_unless_it_is_done_or_wrong(tmp_path, ends, expected):
    def warn(line: str) -> None:
        if line == "ready":
            threading.Thread(target=os.kill, args=(os.getpid(), signal.SIGUSR1)).start()

    assert child(WARNED.format(ends), tmp_path, on_line=warn) == expected


def test_a_requeued_job_takes_over_from_a_node_that_is_gone_and_no_other_job_does(monkeypatch):
    monkeypatch.setenv("ALIGN_JOB", "slurm-7")
    holder = {**identity(os.getpid()), "host": "another"}
    assert not is_alive(holder)
    monkeypatch.setenv("ALIGN_JOB", "slurm-8")
    assert is_alive(holder)
    monkeypatch.delenv("ALIGN_JOB")
    assert is_alive(holder)
    assert is_alive({**identity(os.getpid()), "host": "another"})  # a run by hand, seen from another by hand


def test_a_jobs_processes_get_logs_of_their_own(monkeypatch):
    machine = Machine(Path("m.yaml"), {"distributed_type": "MULTI_GPU", "num_processes": 2, "use_cpu": True})
    assert "--tee" not in stage_command("stages.sft", Path("c.yaml"), machine).argv
    monkeypatch.setenv("ALIGN_RANK_LOGS", "logs/7/node-0")
    assert "--tee 3 --log_dir logs/7/node-0 -m stages.sft" in stage_command("stages.sft", Path("c.yaml"), machine).typed
