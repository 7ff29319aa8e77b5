"""Told to stop, a run saves, leaves with 85 and goes on as if nothing had happened; a run that hangs ends with its stacks and leaves nothing behind.

Two processes each. The whole table of signals and skews is in `make reliability`.
"""

from __future__ import annotations

import re
import signal
from pathlib import Path

import deepspeed  # noqa: F401 - imported before the forks, once
import pytest
import torch  # noqa: F401
import trl  # noqa: F401

from configs.exit_codes import HANG, REQUEUE
from stages.training import saves
from tests.launch import launched, told


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("stage", "way"), [("sft", told.Way("USR1, rank 1 only", signal.SIGUSR1, (None, 0.0))), ("ppo", told.Way("TERM, skew 0.2 s", signal.SIGTERM, (0.0, 0.2), 0.02))])
def test_told_to_stop_a_run_ends_as_the_uninterrupted_one_to_the_bit(tmp_path, monkeypatch, stage, way):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    folder = told.workspace(tmp_path / "w", stage)
    whole = told.settings(folder, stage, "whole")
    assert told.ends(told.start(stage, whole)) == [0, 0], (folder / "whole.0.log").read_text()
    found = told.trial(folder, stage, way, 0, 3, 0.0, whole)
    assert told.good(found), "\n".join(f"{key}: {value}" for key, value in found.items())
    assert found["lines"] < len(told.lines(whole)), "it was stopped on the way"


def test_align_passes_the_signal_on_and_its_exit_code_back(tmp_path):
    folder = told.workspace(tmp_path / "w", "sft")
    values = told.settings(folder, "sft", "told", max_steps=5000)
    process = launched.start(values)
    launched.wait_for_lines(process, values, 2)
    pids = launched.ranks(process)
    process.send_signal(signal.SIGTERM)
    log = launched.log_of(values)
    assert launched.ends(process) == REQUEUE, log.read_text()
    assert launched.gone(list(pids.values()))
    (save,) = (Path(values["output"]) / "resume").glob("checkpoint-*")
    assert saves.problem(save) is None
    told_so = re.search(r"stopped because it was told to \((SIGTERM|a signal to another process)\): saved at step (\d+) of 5000", log.read_text())
    assert told_so, log.read_text()
    assert save.name == f"checkpoint-{told_so[2]}"
    assert "Traceback" not in log.read_text(), "torch's launcher ends in one, which is none of the person's concern"


def test_a_stopped_process_ends_the_run_with_stacks_and_nothing_is_left(tmp_path):
    found = launched.stop_a_rank(told.workspace(tmp_path / "w", "sft"), limit=3.0)
    assert found["code"] == HANG, found["log"]
    assert found["seconds"] < found["limit"] + 10 + 5  # and what a loaded machine takes to end the launcher
    assert found["gone"]
    assert f"rank 1 did not answer: process {found['pid']} is T (stopped); last seen on " in found["log"]
    assert "error: rank 0 of 2 (process " in found["log"]
    assert "in phase update (limit: watchdog.update, 0.05 min)" in found["log"]
    assert "_inner_training_loop" in found["stacks"]
