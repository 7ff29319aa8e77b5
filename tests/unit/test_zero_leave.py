"""How a process that has met others ends: with the exit code that Python would give, after threads and exit handlers."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# A group of one process: enough for leave() to end it. The thread would abort the process if libraries were unloaded under it.
PROGRAM = """
import atexit, os, sys, threading, time
import torch.distributed as dist
from configs.errors import UserError
from stages.zero.leave import leave
dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=0, world_size=1)
atexit.register(lambda: print("handler ran"))
threading.Thread(target=lambda: (time.sleep(0.2), print("thread done"))).start()
print("no newline, not flushed", end=" ")
try:
    {body}
finally:
    leave(sys.exc_info()[1])
print("leave returned")
"""


@pytest.mark.parametrize(
    ("body", "code", "said"),
    [
        ("pass", 0, ""),
        ("sys.exit(2)", 2, ""),
        ("sys.exit()", 0, ""),
        ("sys.exit('in words')", 1, "in words"),
        ("raise RuntimeError('broken')", 1, "RuntimeError: broken"),
        ("raise KeyboardInterrupt", 130, "KeyboardInterrupt"),
    ],
)
def test_a_process_in_a_group_ends_with_the_code_of_its_error(tmp_path, body, code, said):
    done = subprocess.run([sys.executable, "-c", PROGRAM.format(body=body), str(tmp_path / "store")], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert done.stdout.endswith("no newline, not flushed thread done\nhandler ran\n"), "torch 2.10's gloo says something before"


def test_without_a_group_python_ends_the_process_as_ever():
    program = "import sys\nfrom stages.zero.leave import leave\nleave(None)\nassert 'torch.distributed' not in sys.modules\nprint('on')"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "on\n"


@pytest.mark.parametrize("body", ["pass", "raise RuntimeError('broken')"])
def test_an_executor_that_nobody_shut_down_does_not_keep_the_process(tmp_path, body):
    """Its threads are no daemons and wait for work until Python tells them to end."""
    idle = "from concurrent.futures import ThreadPoolExecutor; pool = ThreadPoolExecutor(1); pool.submit(int).result(); "
    done = subprocess.run([sys.executable, "-c", PROGRAM.format(body=idle + body), str(tmp_path / "store")], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == (0 if body == "pass" else 1)
    assert done.stdout.endswith("thread done\nhandler ran\n")


HANGS = {
    "another that does not come": "leave.__globals__['wait_for_everyone'] = lambda: time.sleep(60)",
    "a thread": "threading.Thread(target=time.sleep, args=(60,)).start()",
    "an exit handler": "atexit.register(time.sleep, 60)",
}


@pytest.mark.parametrize(("what", "code"), [*((what, 0) for what in HANGS), ("a thread", 85)])
def test_a_process_that_hangs_after_its_work_is_ended_with_its_own_code(tmp_path, what, code):
    """Nothing watched it there: the watchdog has ended by then."""
    body = f"leave.__globals__['BOUND'] = 1.0; {HANGS[what]}" + (f"; sys.exit({code})" if code else "")
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", PROGRAM.format(body=body), str(tmp_path / "store")], cwd=ROOT, capture_output=True, text=True, timeout=50)
    assert done.returncode == code, done.stderr
    assert time.monotonic() - began < 40
    assert f"did not end within 1 s after its work and is ended now, with its exit code {code}; where it hung:" in done.stderr
    assert "most recent call first" in done.stderr


def test_what_went_wrong_is_told_before_and_without_waiting_for_the_others(tmp_path):
    """With NCCL, destroying the group waits for all ranks, and those that wait in a collective never come."""
    stuck = "dist.destroy_process_group = lambda: time.sleep(300)\n    raise RuntimeError('broken')"
    done = subprocess.run([sys.executable, "-c", PROGRAM.format(body=stuck), str(tmp_path / "store")], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "RuntimeError: broken" in done.stderr
