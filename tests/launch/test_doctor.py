"""The whole of `align doctor` on this machine: two processes over gloo, a tiny training run, and exit code 0."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_doctor_finds_this_machine_able(tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "launch.cli", "doctor", "--json"]  # from another folder: its children must find the project
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600, check=False)
    value = json.loads(done.stdout)
    checks = {row["name"]: row for row in value["checks"]}
    assert done.returncode == 0, value
    assert checks["gloo"]["facts"]["sum"] == 3.0  # ranks 0 and 1 bring 1 and 2
    assert checks["torch and threads"]["facts"]["threads"] == 1
    first, last = checks["self-test"]["facts"]["loss"]
    assert last < 0.8 * first
    assert checks["self-test"]["facts"]["sampled tokens"] > 0
    assert value["left_out"] == []
    assert list(tmp_path.iterdir()) == []  # it leaves nothing where it was started
