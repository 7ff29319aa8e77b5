"""Runs the techniques one after another, each in a process of its own, and collects the rows of the table."""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from configs.errors import UserError
from launch.compare.place import working
from launch.compare.table import said
from launch.compare.techniques import TECHNIQUES, Entry
from launch.doctor.self_test import first_gpu
from launch.process import die_with_parent, leaving_when_told

Row = dict[str, Any]
BUILT_IN = Path("runs/sft-compare")  # where the comparison on the model that it makes itself works


def compare(config: str | None, overrides: Sequence[str], names: Sequence[str], steps: int, say: Callable[[str], None]) -> list[Row]:
    """A row for each name: what was measured, or `reason` why it was not.

    Without `config` a small model is made and trained on generated rows. Nothing stays on the disk: each technique's folder goes with its row, the rest at the end.

    Raises:
        UserError: the config is wrong, steps below 2, or another comparison works in the same place.
        SystemExit: told to end by a signal, with REQUEUE.
    """
    if steps < 2:
        raise UserError(f"--steps {steps}: expected at least 2; the first step warms up and is not timed")
    values = None if config is None else _configured(config, overrides)
    output = Path(values["output"] or f"runs/sft-{values['name']}") if values is not None else BUILT_IN
    with leaving_when_told(), working(output.resolve(), say) as folder:
        values = values if values is not None else _built_in(folder / "built-in", say)
        return [_row(technique, values, folder / technique, steps, say) for technique in names]


def _configured(config: str, overrides: Sequence[str]) -> Row:
    """The config as values, with the folder of its parent in the place of a registry's name."""
    from configs.load import load
    from stages import models

    cfg = load(Path(config), "sft", list(overrides))
    origin = models.find(cfg.init_from, cfg.registry, stages=("sft", "dpo", "ppo"))
    models.verify(origin)
    values: Row = cfg.model_dump(mode="json")
    return values | {"init_from": str(Path(origin.folder).resolve()) if Path(origin.folder).is_dir() else origin.folder}


def _built_in(folder: Path, say: Callable[[str], None]) -> Row:
    """A base of a third of a million parameters that has read a little, and 240 rows."""
    from launch.demo.base import train_base
    from launch.demo.world import demonstrations, draw_cases
    from launch.jsonl import write_jsonl

    say("making a small base model and rows (give --config for your own)")
    with contextlib.redirect_stdout(sys.stderr):  # stdout is the table's, or with --json the one line of JSON
        train_base(str(folder / "base"), steps=80)
    rng = random.Random("compare")
    write_jsonl(folder / "rows.jsonl", demonstrations(rng, draw_cases(rng, 240), 1.0))
    return {
        "name": "compare", "init_from": str(folder / "base"), "data": str(folder / "rows.jsonl"), "max_length": 256, "split": {"validation": 0.2, "test": 0},
        "train": {"batch_size": 16, "micro_batch_size": 16, "learning_rate": 1e-3},
    }  # fmt: skip


def _row(technique: str, values: Row, own: Path, steps: int, say: Callable[[str], None]) -> Row:
    """Measure a technique in the folder `own`, and remove that: two of them may be more than the disk has room for."""
    entry = TECHNIQUES.get(technique)
    if entry is None:
        close = difflib.get_close_matches(technique, TECHNIQUES, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        return {"technique": technique, "reason": f"no such technique; expected some of {', '.join(TECHNIQUES)}.{hint}"}
    rate = values["train"].get("learning_rate", 1e-5) * entry.rate
    say(f"{technique}: {steps} steps at a learning rate of {rate:g}")
    try:
        found = run_worker(job_of(entry, values, own, steps), own)
    finally:
        shutil.rmtree(own, ignore_errors=True)
    say(f"  {found['reason'] if 'reason' in found else said(found)}")
    return {"technique": technique, "when": entry.when, "learning_rate": rate} | found


def job_of(entry: Entry, values: Row, own: Path, steps: int) -> Row:
    """The config of one technique's run, as values."""
    sections = entry.sections(steps)
    train = values["train"] | {"max_steps": steps, "eval_every": steps, "save_every": steps, "log_every": steps, "early_stopping_patience": None}
    train["learning_rate"] = train.get("learning_rate", 1e-5) * entry.rate
    return values | {
        "name": "compare", "registry": str(own / "registry"), "output": str(own / "out"), "lora": None, "tune": sections["tune"], "keep_resume": False,
        "evaluation": {"test": False}, "health": {"action": "off"},  # they would take memory and time that are not the technique's
        "train": train | sections["train"],
    }  # fmt: skip


def run_worker(job: dict[str, Any], folder: Path) -> Row:
    """What the worker measured, or `reason`."""
    folder.mkdir(parents=True)
    (folder / "job.json").write_text(json.dumps(job))
    command = [sys.executable, "-m", "launch.compare.worker", str(folder / "job.json"), str(folder / "result.json")]
    env = os.environ | {
        "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "CUDA_VISIBLE_DEVICES": first_gpu(os.environ.get("CUDA_VISIBLE_DEVICES")),
    }  # fmt: skip
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, preexec_fn=die_with_parent(9))
    if done.returncode == 0:
        found: Row = json.loads((folder / "result.json").read_text())
        return found
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    said = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), lines[-1] if lines else "")
    return {"reason": said or f"its process ended with exit code {done.returncode}"}
