"""The machine files under the real `accelerate launch`."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from configs.machines import machine_file

PROBE = """
import json, sys
import torch
from accelerate import Accelerator
accelerator = Accelerator(cpu=True)
ranks = accelerator.gather(torch.tensor([accelerator.process_index + 1.0]))
if accelerator.is_main_process:
    kind, backend = accelerator.distributed_type.value, torch.distributed.get_backend() if accelerator.num_processes > 1 else None
    facts = {"ranks": ranks.tolist(), "kind": kind, "backend": backend, "precision": accelerator.mixed_precision, "steps": accelerator.gradient_accumulation_steps}
    with open(sys.argv[1], "x") as file:  # "x": a second main process is an error
        json.dump(facts, file)
accelerator.end_training()
"""


@pytest.mark.parametrize(
    ("machine", "expected"),
    [
        ("cpu", {"ranks": [1.0], "kind": "NO", "backend": None, "precision": "no", "steps": 1}),
        ("cpu_ddp", {"ranks": [1.0, 2.0], "kind": "MULTI_CPU", "backend": "gloo", "precision": "no", "steps": 1}),
    ],
)
def test_processes_of_a_machine_file_meet(tmp_path, machine, expected):
    """Two processes that do not meet would each be rank 0 of a world of one, and train and publish twice."""
    script, result = tmp_path / "probe.py", tmp_path / "facts.json"
    script.write_text(PROBE)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(machine_file(machine)), "--main_process_port", "0"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*command, str(script), str(result)], env=env, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(result.read_text()) == expected
