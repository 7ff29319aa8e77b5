"""Small hand-made checkpoints, and processes that use one registry at once."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from stages.registry import Checkpoint, Parent, Registry

ROOT = Path(__file__).resolve().parents[2]


def writer(value: float = 1.0):
    """A write function for publish: weights, a config and a file in a sub-folder."""

    def write(folder: Path) -> None:
        save_file({"weight": np.full((4, 3), value, np.float32)}, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({"value": value}))
        (folder / "extra").mkdir()
        (folder / "extra" / "notes.txt").write_text("ok")

    return write


def publish(registry: Registry, family: str = "sft/demo", value: float = 1.0, parents: list[Parent] | None = None, **info) -> Checkpoint:
    """Publish a small checkpoint."""
    stage, name = family.split("/")
    return registry.publish(stage, name, writer(value), parents=parents or [], info=info)


def flip_bit(path: Path, position: int) -> None:
    """Change one bit of one byte of this file alone: another checkpoint may hold the same file under another name, and it is read-only."""
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.with_name(".flipped").write_bytes(content)
    path.with_name(".flipped").replace(path)


def run_together(script: str, count: int, folder: Path) -> list[str]:
    """Run `script` in `count` processes that all pass the same starting line; their stdout. sys.argv[1] is the number."""
    start = folder / "start"
    line = f"import sys, time, pathlib\nprint('ready', flush=True)\nwhile not pathlib.Path({str(start)!r}).exists(): time.sleep(0.001)\n"
    preamble = "import stages.registry, blake3, tests.unit.registry_samples\n"
    children = [
        subprocess.Popen(
            [sys.executable, "-c", preamble + line + script, str(index)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        )
        for index in range(count)
    ]  # fmt: skip
    for child in children:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n", child.stderr.read()
    start.touch()
    deadline = time.monotonic() + 60
    outputs = [child.communicate(timeout=deadline - time.monotonic()) for child in children]
    assert [child.returncode for child in children] == [0] * count, [err for _, err in outputs]
    return [out for out, _ in outputs]
