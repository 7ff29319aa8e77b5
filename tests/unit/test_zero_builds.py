"""A build of torch's that was killed leaves a lock for which every later run would wait; one that is at work is left alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from stages.zero import builds

BUILD = """
import sys, time
from torch.utils.file_baton import FileBaton
baton = FileBaton(sys.argv[1])
assert baton.try_acquire()
print("building", flush=True)
time.sleep(60)
"""


@pytest.fixture
def lock(tmp_path: Path, monkeypatch) -> Path:
    """Where torch's lock of an operator lies; on a local disk, whatever the tests run on."""
    monkeypatch.setenv(builds.FOLDER, str(tmp_path))
    monkeypatch.setattr(builds, "on_network", lambda path: False)
    (tmp_path / "py311_cpu" / "operator").mkdir(parents=True)
    return tmp_path / "py311_cpu" / "operator" / builds.LOCK


def test_the_lock_of_a_killed_build_goes_and_that_of_a_build_at_work_stays(lock):
    build = subprocess.Popen([sys.executable, "-c", BUILD, str(lock)], stdout=subprocess.PIPE, text=True)
    try:
        assert build.stdout is not None
        assert build.stdout.readline() == "building\n"
        assert builds.remove_abandoned_locks() == []
        assert lock.exists()
    finally:
        build.kill()
        build.wait()
    assert lock.exists(), "that is the trap"
    assert builds.remove_abandoned_locks() == [lock]
    assert not lock.exists()


def test_where_another_machine_may_be_building_a_lock_goes_once_it_is_old(lock, monkeypatch):
    monkeypatch.setattr(builds, "on_network", lambda path: True)
    lock.touch()
    made = lock.stat().st_mtime
    assert builds.remove_abandoned_locks(made + builds.ELSEWHERE - 1) == []
    assert builds.remove_abandoned_locks(made + builds.ELSEWHERE + 1) == [lock]


def test_locks_lie_where_torch_looks_for_them(lock, monkeypatch):
    from torch.utils.cpp_extension import get_default_build_root

    monkeypatch.delenv(builds.FOLDER)
    assert str(builds.folder()) == get_default_build_root()
    assert os.path.basename(lock) == "lock"
