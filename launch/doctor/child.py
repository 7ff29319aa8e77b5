"""Starts another Python of this project and reads its answer: the last line of its output, JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")  # ours is no process of theirs
ROOT = Path(__file__).resolve().parents[2]


class ChildError(RuntimeError):
    """The child ended without an answer; the message is what it said last."""


def environment(**more: str) -> dict[str, str]:
    """Ours, with this project importable from any folder and nothing reported to a hub."""
    path = os.pathsep.join(part for part in (str(ROOT), os.environ.get("PYTHONPATH", "")) if part)
    inherited = {key: value for key, value in os.environ.items() if key not in LAUNCHERS}
    return {**inherited, "PYTHONPATH": path, "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false", **more}


def ask(module: str, *arguments: str, seconds: float, **more: str) -> Any:
    """The answer of `python -m module arguments`. Raises ChildError, also after `seconds`."""
    command = [sys.executable, "-m", module, *arguments]
    try:
        done = subprocess.run(command, env=environment(**more), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired as error:
        raise ChildError(f"no answer after {seconds:.0f} s") from error
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines:
        return json.loads(lines[-1])
    raise ChildError(last_words(done.stderr, done.returncode))


def last_words(stderr: str, code: int) -> str:
    """The line of a process's stderr that says what went wrong."""
    lines = [line.strip() for line in stderr.strip().splitlines() if line.strip()]
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    return f"{lines[-1]} ({how})" if lines else how
