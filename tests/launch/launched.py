"""A real `align sft` on two processes, started, told things, and looked at from outside."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from stages.training.siblings import children, environment, state
from tests.launch import told
from tests.stage.runs import ENVIRONMENT, ROOT


def start(values: dict[str, Any], *overrides: str) -> subprocess.Popen[bytes]:
    """`align sft` with this config on two processes; output goes to a file beside its registry."""
    config = Path(values["registry"]).parent / f"{values['name']}.json"
    config.write_text(json.dumps(values))
    command = [sys.executable, "-m", "launch.cli", "sft", "--config", str(config), "--machine", "cpu_ddp", "--processes", "2", *overrides]
    with log_of(values).open("ab") as log:
        return subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)


def log_of(values: dict[str, Any]) -> Path:
    """What `align` and the stage printed."""
    return Path(values["registry"]).parent / f"{values['name']}.log"


def wait_for_lines(process: subprocess.Popen[bytes], values: dict[str, Any], count: int) -> None:
    """Return once so many lines of metrics are written."""
    until = time.monotonic() + 240
    while len(told.lines(values)) < count:
        assert process.poll() is None, log_of(values).read_text()[-3000:]
        assert time.monotonic() < until, log_of(values).read_text()[-3000:]
        time.sleep(0.02)


def ranks(process: subprocess.Popen[bytes]) -> dict[int, int]:
    """Rank -> process id of the training processes below `align`."""
    found, waiting = {}, [process.pid]
    while waiting:
        pid = waiting.pop()
        variables = environment(pid)
        if "LOCAL_RANK" in variables and "TORCHELASTIC_RUN_ID" in variables:
            found[int(variables["RANK"])] = pid
        waiting += children(pid)
    return found


def ends(process: subprocess.Popen[bytes], within: float = 240) -> int:
    """Its exit code; it is killed where it does not end."""
    try:
        return process.wait(within)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise


def gone(pids: list[int], within: float = 10.0) -> bool:
    """Whether none of the processes is left."""
    until = time.monotonic() + within
    while any(state(pid)[:1] not in ("", "Z") for pid in pids) and time.monotonic() < until:
        time.sleep(0.05)
    return all(state(pid)[:1] in ("", "Z") for pid in pids)


def stop_a_rank(folder: Path, limit: float) -> dict[str, Any]:
    """Stop rank 1 (SIGSTOP) of a run whose updates may take `limit` seconds without progress; what came of it."""
    values = told.settings(folder, "sft", "stopped", max_steps=5000) | {"watchdog": {"update": limit / 60}}
    process = start(values)
    wait_for_lines(process, values, 2)
    pids = ranks(process)
    assert sorted(pids) == [0, 1], pids
    began = time.monotonic()
    os.kill(pids[1], signal.SIGSTOP)
    code = ends(process)
    stacks = Path(values["output"]) / "hang-rank-0.txt"
    return {
        "code": code, "seconds": time.monotonic() - began, "limit": limit, "gone": gone(list(pids.values())), "pid": pids[1],
        "stacks": stacks.read_text() if stacks.exists() else "", "log": log_of(values).read_text(),
    }  # fmt: skip
