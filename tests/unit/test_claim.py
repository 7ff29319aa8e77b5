"""The claim on a working folder: one holder, and a dead holder is none."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading

import pytest

from configs.errors import UserError
from stages.claim import TOKEN, Claim, identity, is_alive
from stages.processes import start_time
from stages.training import entry


def test_held_once_and_free_afterwards(tmp_path):
    with Claim(tmp_path, "align run"), pytest.raises(UserError, match=f"process {os.getpid()} "), Claim(tmp_path, "align run"):
        pass
    with Claim(tmp_path, "align run"):
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
    with Claim(tmp_path, "align run"):
        assert [path.name for path in (tmp_path / ".lock").iterdir()] == ["00000004.json"]


def test_the_same_number_of_a_later_process_is_another_process():
    later = {**identity(os.getpid()), "start": 1}
    assert is_alive(identity(os.getpid()))
    assert not is_alive(later)


def test_a_dead_run_whose_stage_still_lives_holds_the_folder(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        (tmp_path / ".lock").mkdir()
        (tmp_path / ".lock" / "00000001.json").write_text(json.dumps({**_dead(), "what": "align run", "child": identity(child.pid)}))
        with pytest.raises(UserError, match=r"`align run` .* works in this folder already"), Claim(tmp_path, "align sft", patience=0.2):
            pass
    finally:
        child.communicate()
    with Claim(tmp_path, "align run"):
        pass


def test_another_machine_counts_as_alive_and_a_cut_file_as_nobody(tmp_path):
    assert is_alive({**_dead(), "host": "elsewhere"})
    (tmp_path / ".lock").mkdir()
    (tmp_path / ".lock" / "00000001.json").write_text("{")
    for damaged in ("[1]", '{"host": "here"}'):
        (tmp_path / "other" / ".lock").mkdir(parents=True, exist_ok=True)
        (tmp_path / "other" / ".lock" / "00000007.json").write_text(damaged)
        with Claim(tmp_path / "other", "align run"):
            pass
    with Claim(tmp_path, "align run"):
        pass


def test_a_stage_alone_in_its_folder_goes_on_where_a_scheduler_starts_it_again(tmp_path, capsys):
    (tmp_path / ".lock").mkdir()
    claim = tmp_path / ".lock" / "00000001.json"
    claim.write_text(json.dumps({**_dead(), "what": "align sft", "host": "elsewhere"}))
    with pytest.raises(UserError, match=r"`align sft` .* on elsewhere, .* works"), Claim(tmp_path, "align run"):
        pass
    with Claim(tmp_path, "align sft", here_only=True):
        assert "`align sft` on elsewhere (since" in capsys.readouterr().err
        with pytest.raises(UserError, match="`align sft` "), Claim(tmp_path, "stages.sft", here_only=True):
            pass


def test_a_folder_that_cannot_be_written_is_an_error_of_the_users(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written: Not a directory; give another output"), Claim(tmp_path / "file", "align run"):
        pass


def test_two_of_one_stage_at_once(tmp_path):
    """Each would remove the other's saves, so the second is refused before it has written anything."""
    config = tmp_path / "sft.yaml"
    config.write_text(f"name: two\nregistry: {tmp_path}/registry\noutput: {tmp_path}/out\ninit_from: nobody/none\ndata: none.jsonl\n")
    command = [sys.executable, "-m", "launch.cli", "sft", "--config", str(config)]
    with Claim(tmp_path / "out", "align sft"):
        second = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert (second.returncode, second.stderr.partition(" (process")[0]) == (2, f"error: {tmp_path}/out: `align sft`")
        assert not (tmp_path / "out" / "config.yaml").exists()


def test_of_many_who_see_the_same_dead_holder_one_wins(tmp_path):
    (tmp_path / ".lock").mkdir()
    (tmp_path / ".lock" / "00000001.json").write_text(json.dumps(_dead()))
    start, stop, won = threading.Barrier(8), threading.Event(), []

    def race(number: int) -> None:
        start.wait()
        try:
            with Claim(tmp_path, "align run"):
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


@pytest.fixture
def bare(tmp_path, monkeypatch):
    """`python -m stages.sft` up to where it would train, in this process: how the next one that claims its folder fares there."""
    config = tmp_path / "sft.yaml"
    config.write_text(f"name: two\nregistry: {tmp_path}/registry\noutput: {tmp_path}/out\ninit_from: {tmp_path}\ndata: none.jsonl\n")
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(entry.stop, "listen", lambda: None)  # signals are the tests' own

    def start() -> list[str]:
        came = []

        def train(cfg):
            try:
                with Claim(cfg.output, "align sft", here_only=True):
                    came.append("let in")
            except UserError as error:
                came.append(str(error).partition(" (process")[0])

        entry.run(train, "sft", ["--config", str(config)])
        return came

    return start


def test_a_bare_stage_claims_its_folder_and_gives_it_back(bare, tmp_path):
    for _ in range(2):
        assert bare() == [f"{tmp_path}/out: `stages.sft`"]
        assert list((tmp_path / "out" / ".lock").iterdir()) == []


def test_a_bare_stage_is_refused_where_another_run_works_before_it_touches_anything(bare, tmp_path, capsys):
    with Claim(tmp_path / "out", "align sft"):
        with pytest.raises(SystemExit) as left:
            bare()
        assert left.value.code == 2
        assert f"error: {tmp_path}/out: `align sft` (process {os.getpid()} on " in capsys.readouterr().err
        assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]


def test_the_stage_that_align_has_started_is_let_in_and_leaves_the_claim_to_it(bare, tmp_path, monkeypatch):
    with Claim(tmp_path / "out", "align sft") as claim:
        for name, value in claim.handed_on.items():
            monkeypatch.setenv(name, value)
        assert bare() == ["let in"]
        monkeypatch.delenv(TOKEN)
        with pytest.raises(UserError, match="`align sft`"), Claim(tmp_path / "out", "stages.sft", here_only=True):
            pass


def test_start_time_of_what_does_not_run():
    assert start_time(2**22 + 1) is None


def test_held_once_where_the_file_system_makes_no_hard_links(tmp_path, monkeypatch):
    def refuse(source, target):
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(os, "link", refuse)
    with Claim(tmp_path, "align run"):
        assert [path.name for path in (tmp_path / ".lock").iterdir()] == ["00000001.json"]
        with pytest.raises(UserError, match=f"process {os.getpid()} "), Claim(tmp_path, "align run"):
            pass
    assert list((tmp_path / ".lock").iterdir()) == []
