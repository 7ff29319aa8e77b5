"""The chain's lock: one holder, and a dead holder is none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading

import pytest

from configs.errors import UserError
from launch.chain.lock import ChainLock, identity, is_alive, start_time


def test_held_once_and_free_afterwards(tmp_path):
    with ChainLock(tmp_path), pytest.raises(UserError, match=f"process {os.getpid()} "), ChainLock(tmp_path):
        pass
    with ChainLock(tmp_path):
        pass
    assert list((tmp_path / ".lock").iterdir()) == []


def _dead() -> dict:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    holder = identity(child.pid)
    assert is_alive(holder)
    child.communicate()
    return holder


def test_a_dead_process_holds_nothing(tmp_path):
    (tmp_path / ".lock").mkdir()
    (tmp_path / ".lock" / "00000003.json").write_text(json.dumps(_dead()))
    with ChainLock(tmp_path):
        assert [path.name for path in (tmp_path / ".lock").iterdir()] == ["00000004.json"]


def test_the_same_number_of_a_later_process_is_another_process():
    later = {**identity(os.getpid()), "start": "1"}
    assert is_alive(identity(os.getpid()))
    assert not is_alive(later)


def test_a_dead_run_whose_stage_still_lives_holds_the_folder(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        (tmp_path / ".lock").mkdir()
        (tmp_path / ".lock" / "00000001.json").write_text(json.dumps({**_dead(), "child": identity(child.pid)}))
        with pytest.raises(UserError, match="another `align run`"), ChainLock(tmp_path, patience=0.2):
            pass
    finally:
        child.communicate()
    with ChainLock(tmp_path):
        pass


def test_another_machine_counts_as_alive_and_a_cut_file_as_nobody(tmp_path):
    assert is_alive({**_dead(), "host": "elsewhere"})
    (tmp_path / ".lock").mkdir()
    (tmp_path / ".lock" / "00000001.json").write_text("{")
    with ChainLock(tmp_path):
        pass


def test_of_many_who_see_the_same_dead_holder_one_wins(tmp_path):
    (tmp_path / ".lock").mkdir()
    (tmp_path / ".lock" / "00000001.json").write_text(json.dumps(_dead()))
    start, stop, won = threading.Barrier(8), threading.Event(), []

    def race(number: int) -> None:
        start.wait()
        try:
            with ChainLock(tmp_path):
                won.append(number)
                stop.wait(5)
        except UserError:
            pass
        if len(won) + sum(not t.is_alive() for t in threads) >= 8:
            stop.set()

    threads = [threading.Thread(target=race, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(0.5)
    stop.set()
    for thread in threads:
        thread.join()
    assert len(won) == 1


def test_start_time_of_what_does_not_run():
    assert start_time(2**22 + 1) is None
