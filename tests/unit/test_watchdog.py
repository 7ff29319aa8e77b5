"""The watchdog: what counts as moving, who is waited for, and what it writes at the end."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from configs.exit_codes import HANG
from configs.schema import EvalConfig
from configs.schema.common import Watchdog
from stages.training import exit_later, hang, lockstep, scoring, watchdog
from tests.forked import forked
from tests.stage.runs import ROOT

LIMITS = dict.fromkeys(Watchdog.model_fields, 10.0)


class EndedError(Exception):
    """In place of the end of the process."""


@pytest.fixture
def watch(tmp_path, monkeypatch):
    """The watchdog of rank 0 of 2, in an update that has just moved, and no thread."""

    def ended(_watch):
        made.now.phase = "ended"
        raise EndedError

    monkeypatch.setattr(hang, "end", ended)
    monkeypatch.setattr(watchdog, "bytes_moved", lambda: 0)
    monkeypatch.setattr(watchdog.faulthandler, "dump_traceback_later", lambda *_, **__: None)
    monkeypatch.setattr(watchdog, "exit_later", lambda *_: True)
    now = watchdog.Now()
    now.phase = "update"
    made = watchdog.Watch(LIMITS, tmp_path, 0, 2, now)
    return made


def other(watch, seconds_ago: float) -> None:
    watch.heartbeat(1).write_text(json.dumps({"rank": 1, "host": "h", "pid": 1, "phase": "update", "step": 3, "beaten": time.time() - seconds_ago}))


def test_a_phase_that_moves_or_has_no_limit_goes_on(watch):
    watch.look(1)
    watch.now.beaten -= 9
    watch.look(1)
    watch.limits = LIMITS | {"update": math.inf}
    watch.now.beaten -= 1000
    watch.look(1)
    assert watch.now.phase == "update", "it was not ended"


def test_nobody_moved(watch):
    watch.now.beaten -= 10.5
    other(watch, 10.5)
    with pytest.raises(EndedError):
        watch.look(1)


def test_another_process_never_came(watch):
    watch.now.beaten -= 10.5
    with pytest.raises(EndedError):
        watch.look(1)


def test_a_slow_process_is_waited_for(watch):
    watch.now.beaten -= 100
    other(watch, 8)
    watch.look(1)
    other(watch, 11)
    with pytest.raises(EndedError):
        watch.look(1)


def test_another_process_asks_for_the_stacks(watch):
    watch.look(1)
    (watch.folder / watchdog.WANTED).touch()
    with pytest.raises(EndedError):
        watch.look(1)


def test_what_an_earlier_run_asked_for_is_not_heeded(watch):
    file = watch.folder / watchdog.WANTED
    file.touch()
    os.utime(file, (time.time() - 60,) * 2)
    watch.look(1)
    assert watch.now.phase == "update", "it was not ended"


@pytest.mark.parametrize("phase", LIMITS)
def test_every_phase_has_the_limit_of_its_own_name(watch, phase):
    """Real runs stand still in each but `load` in make reliability."""
    watch.limits = {name: 100.0 * number for number, name in enumerate(LIMITS, 1)}
    watch.now.phase = phase
    watch.now.beaten -= watch.limits[phase] - 5
    watch.look(1)
    watch.now.beaten -= 10
    assert f"in phase {phase} (limit: watchdog.{phase}, {watch.limits[phase] / 60:g} min)" in hang.describe(watch)
    assert hang.ADVICE[phase]
    with pytest.raises(EndedError):
        watch.look(1)


@pytest.mark.parametrize(("phase", "goes_on"), [("save", True), ("load", True), ("publish", True), ("update", False)])
def test_bytes_are_progress_where_models_are_moved(watch, monkeypatch, phase, goes_on):
    watch.now.phase = phase
    watch.now.beaten -= 10.5
    monkeypatch.setattr(watchdog, "bytes_moved", lambda: 2 << 20)
    if goes_on:
        watch.look(1)
    else:
        with pytest.raises(EndedError):
            watch.look(1)


def test_a_suspended_process_has_not_hung(watch):
    watch.now.beaten -= 3605
    watch.look(gap=3600)
    assert watch.now.phase == "update", "it was not ended"


def test_a_phase_within_a_phase():
    watchdog.phase("scoring", 7)
    with watchdog.during("save"):
        assert watchdog._now.phase == "save"
    assert (watchdog._now.phase, watchdog._now.step) == ("scoring", 7)


def test_a_beat_costs_less_than_a_microsecond_or_two():
    began = time.process_time()  # of the processor: a loaded machine makes no difference
    for _ in range(100_000):
        watchdog.beat()
    assert (time.process_time() - began) / 100_000 < 5e-6


HANGING = """
import ctypes, sys, time
from pathlib import Path
from configs.schema import EvalConfig
from configs.schema.common import Watchdog
from stages.training import watchdog
class cfg: watchdog = Watchdog(data=float(sys.argv[2]) / 60)
watchdog.start(cfg, Path(sys.argv[1]))
def a_row_that_takes_for_ever():
    if sys.argv[3] == "python":
        time.sleep(60)
    ctypes.PyDLL(None).sleep(60)  # keeps the interpreter's lock: no other thread runs
watchdog.phase("data", 0)
time.sleep(0.6)
a_row_that_takes_for_ever()
"""


@pytest.mark.parametrize(("where", "most"), [("python", 30), ("library", 50)])
def test_a_process_that_hangs_leaves_its_stacks_and_a_code_of_its_own(tmp_path, where, most):
    """In a library that keeps the interpreter's lock too, where timers end it: the stacks lie with the heartbeats then, until the next start keeps them."""
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", HANGING, str(tmp_path), "1", where], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == HANG, done.stderr
    assert time.monotonic() - began < most
    if where == "python":
        text = (tmp_path / "hang-rank-0.txt").read_text()
        assert text.startswith("rank 0 of 1 (process ")
        assert "error: rank 0 of 1 (process " in done.stderr
        assert "hangs: no progress for " in done.stderr
        assert "in phase data (limit: watchdog.data, 0.0166667 min)" in done.stderr
        assert "raise watchdog.data (exit code 110)" in done.stderr
    else:
        text = (tmp_path / "heartbeats" / "rank-0.stacks").read_text()
        again = watchdog.Watch(LIMITS, tmp_path, 0, 1)
        assert text in (tmp_path / "hang-rank-0.txt").read_text()
        assert not hang.written(again, 0), "those are not of this run"
    assert "a_row_that_takes_for_ever" in text
    assert Path(tmp_path / "heartbeats" / "rank-0.json").exists()


def test_a_config_without_limits_is_not_watched(tmp_path):
    """An evaluation's: `align run` ended with a traceback at its last step."""
    watchdog.start(EvalConfig(checkpoints={"a": "base"}, prompts=[{"path": "p.jsonl"}], scorers=[{"kind": "length", "target": 3}]), tmp_path)


def test_a_filesystem_under_load_does_not_end_a_process_that_waits(watch, monkeypatch):
    """Past its limit while another one still writes: the timer that ends it without a word must leave time for a heartbeat to be written."""
    armed = []
    monkeypatch.setattr(watchdog.faulthandler, "dump_traceback_later", lambda seconds, **_: armed.append(seconds))
    watch.limits = dict.fromkeys(LIMITS, 3600.0)
    watch.now.beaten -= 3700
    other(watch, 5)
    watch.look(1)
    assert armed[0] > 120


def test_a_look_that_was_held_up_does_not_move_the_last_beat_into_the_future(watch):
    watch.look(gap=600)
    assert watch.now.beaten <= time.monotonic()


def test_scoring_rows_after_training_is_progress(monkeypatch):
    class Trainer:
        accelerator = type("A", (), {"num_processes": 1, "process_index": 0, "device": "cpu", "autocast": nullcontext, "gather": lambda self, x: x})()
        args, processing_class = SimpleNamespace(per_device_eval_batch_size=1), SimpleNamespace(pad_token_id=0)
        model, is_deepspeed_enabled = SimpleNamespace(training=False, eval=lambda: None, train=lambda mode: None), False

    beats = []
    monkeypatch.setattr(lockstep.watchdog, "beat", lambda: beats.append(1))
    monkeypatch.setattr(scoring, "last_token_scores", lambda model, ids, mask: ids[:, -1].float())
    assert scoring.scores(Trainer(), [[1, 2], [3], [4, 5, 6]]).tolist() == [2, 3, 6]
    assert len(beats) == 3


def test_the_timer_that_ends_a_process_is_set_anew_forgotten_and_not_inherited():
    def process():
        assert exit_later.exit_later(0.05, 8)
        assert exit_later.exit_later(600.0, 8)  # in place of that
        assert exit_later.exit_later(0.05, 9)
        exit_later.cancel()
        time.sleep(0.3)
        if (child := os.fork()) == 0:
            exit_later.exit_later(0.05, 7)
            time.sleep(30)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    assert os.waitstatus_to_exitcode(os.waitpid(forked(process), 0)[1]) == 7
