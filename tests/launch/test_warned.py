"""SIGUSR1 under the real `accelerate launch`: it reaches every process, which gets the time to save and say so with its exit code."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

from configs.exit_codes import REQUEUE
from configs.machines import machine_file
from launch.command import child_environment
from launch.process import run_child

WORKER = f"""
import os, signal, sys, time
from pathlib import Path
folder, rank = Path(sys.argv[1]), os.environ["RANK"]
def warned(*_):
    time.sleep(1)  # saving
    (folder / f"saved-{{rank}}").touch()
    sys.exit({REQUEUE})
signal.signal(signal.SIGUSR1, warned)
(folder / f"ready-{{rank}}").touch()
time.sleep(100)
"""


def test_a_warning_reaches_every_process_and_all_of_them_save(tmp_path: Path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(machine_file("cpu_ddp")), "--main_process_port", "0"]

    def warn() -> None:
        until = time.monotonic() + 60
        while len(list(tmp_path.glob("ready-*"))) < 2 and time.monotonic() < until:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGUSR1)

    env = {**os.environ, **child_environment(2)}
    outcome = run_child([*launch, str(script), str(tmp_path)], env, tmp_path / "log", on_start=lambda _: threading.Thread(target=warn).start())
    assert sorted(path.name for path in tmp_path.glob("saved-*")) == ["saved-0", "saved-1"], (tmp_path / "log").read_text()
    assert (outcome.code, outcome.interrupted) == (REQUEUE, False)
