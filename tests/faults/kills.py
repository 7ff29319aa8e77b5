"""SIGKILL at every call of a scenario: each in a process of its own, which is really killed."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from stages.registry.gc import Rules
from tests.faults.promises import Promises, broken, leftovers
from tests.faults.scenarios import Scenario, as_new_process, collect, go_on, silent
from tests.faults.shim import Call, Hook, watching, writes


class Killer(Hook):
    """Kills this process before its `at`-th call, or in the middle of it where it is a write (`torn`)."""

    def __init__(self, at: int, torn: bool) -> None:
        self.at, self.torn = at, torn

    def before(self, index: int, call: Call) -> int | None:
        if index == self.at and not self.torn:
            os.kill(os.getpid(), signal.SIGKILL)
        return 1 if index == self.at else None  # of a torn write one byte gets there

    def after(self, index: int, call: Call) -> None:
        if index == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


def calls(scenario: Scenario, folder: Path) -> list[Call]:
    """The calls of a scenario that nothing interrupts; `folder` is made."""
    folder.mkdir()
    promises = Promises()
    scenario.prepare(folder / "registry", promises)
    as_new_process()
    with watching(folder, Hook()) as shim:
        scenario.act(folder / "registry", promises, silent)
    assert broken(folder / "registry", promises) == []
    return shim.calls


def killed(scenario: Scenario, folder: Path, promises: Promises, at: int, torn: bool) -> Promises:
    """Run the scenario in a child that dies at its `at`-th call; what it had acknowledged by then."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            as_new_process()
            with watching(folder, Killer(at, torn)):
                scenario.act(folder / "registry", promises, lambda: (os.write(writing, pickle.dumps(promises)), None)[1])
            os._exit(0)
        finally:
            os._exit(9)
    os.close(writing)
    status = os.waitpid(child, 0)[1]
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read()
    assert os.WIFSIGNALED(status), f"{scenario.name}: call {at} was never reached (exit status {status})"
    assert os.WTERMSIG(status) == signal.SIGKILL
    return _last(said, promises)


def _last(said: bytes, promises: Promises) -> Promises:
    stream = io.BytesIO(said)
    while stream.tell() < len(said):
        promises = pickle.load(stream)
    return promises


def prepared(scenario: Scenario, folder: Path) -> Promises:
    """Prepare a scenario once, for `copied` to copy."""
    promises = Promises()
    (folder / "prepared").mkdir()
    scenario.prepare(folder / "prepared" / "registry", promises)
    return promises


def copied(folder: Path) -> Path:
    """The folder around a copy of what was prepared; hard links stay hard links."""
    subprocess.run(["cp", "-a", folder / "prepared", folder / "victim"], check=True)
    return folder / "victim"


@dataclass(frozen=True)
class Death:
    """A kill and what did not hold afterwards."""

    scenario: str
    call: str
    problems: list[str]
    left: list[str]


def deaths(scenario: Scenario, folder: Path, every: int = 1) -> Iterator[Death]:
    """Kill at every (`every`-th) call, reads too, and once more in the middle of each write, always beginning with the same registry."""
    seen = calls(scenario, folder / "whole")
    promises = prepared(scenario, folder)
    for at, call in list(enumerate(seen, 1))[::every]:
        for torn in (False, True) if writes(call) else (False,):
            top = copied(folder)
            root = top / "registry"
            acknowledged = killed(scenario, top, promises.copy(), at, torn)
            problems = broken(root, acknowledged) or go_on(root, acknowledged)
            left = leftovers(root)
            if not problems:
                collect(root, Rules(keep=1000, keep_resume=1000, grace=timedelta(0)))
                problems = [f"gc leaves {name}" for name in leftovers(root)] + broken(root, acknowledged)
            yield Death(scenario.name, f"{call} ({at}{', torn' if torn else ''})", problems, left)
            shutil.rmtree(top)
