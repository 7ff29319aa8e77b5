"""Every call that changes something is told that the disk is full or broken; writes come up short."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import UserError
from stages.registry import Registry
from tests.faults.kills import calls, copied, prepared
from tests.faults.promises import Promises, broken
from tests.faults.scenarios import Scenario, as_new_process, go_on
from tests.faults.shim import Call, Hook, watching, writes

SHORT = 0  # in place of an errno: one byte is written, and no error
FREES = ("unlink", "remove", "rmdir")  # work on a full disk too
DONE_BUT = re.compile("was published at|was written, but|was moved|What was moved|in its place or still")  # the error says that something happened all the same


class Failing(Hook):
    """The `at`-th call fails with `number`; `lasting`: and all after it, but those that free room. A write first writes one byte."""

    def __init__(self, at: int, number: int, lasting: bool) -> None:
        self.at, self.number, self.lasting, self.begun = at, number, lasting, False

    def before(self, index: int, call: Call) -> int | None:
        due = index == self.at or (self.lasting and index > self.at and call.name not in (*FREES, "read"))
        if not due:
            return None
        if writes(call) and (self.number == SHORT or not self.begun):
            self.begun = True
            if self.number != SHORT:
                self.at += 1  # what could not be written is tried again, and told then
            return 1
        raise OSError(self.number, os.strerror(self.number), call.paths[0])


@dataclass(frozen=True)
class Fault:
    """One fault and what was wrong afterwards."""

    what: str
    told: str
    problems: list[str]


def _state(root: Path) -> Any:
    if not (root / "registry.json").exists():
        return None
    registry = Registry(root, create=False)
    aliases = registry.aliases("sft/demo") if registry.list() else {}
    return sorted(item.id for item in registry.list()), aliases


def faults(scenario: Scenario, folder: Path, every: int = 1) -> Iterator[Fault]:
    """Each call that changes something, with ENOSPC once and lasting, EIO, and for writes a short one."""
    seen = calls(scenario, folder / "whole")
    promises = prepared(scenario, folder)
    changing = [(at, call) for at, call in enumerate(seen, 1) if call.name not in ("read", "chmod", "utime")]
    kinds = ((errno.ENOSPC, False), (errno.ENOSPC, True), (errno.EIO, False), (SHORT, False))
    for at, call in changing[::every]:
        for number, lasting in kinds:
            if (number == SHORT and not writes(call)) or (number == errno.ENOSPC and call.name in FREES):
                continue
            top = copied(folder)
            name = errno.errorcode.get(number, "short write")
            yield run(scenario, top, promises.copy(), Failing(at, number, lasting), f"{scenario.name}: {name}{' from there on' if lasting else ''} at {call} ({at})")
            shutil.rmtree(top)


def run(scenario: Scenario, top: Path, promises: Promises, failing: Failing, what: str) -> Fault:
    """Do what the scenario does, with one fault; `top` is the folder around its registry."""
    root = top / "registry"
    acknowledged, told = [promises.copy(), _state(root)], ""

    def note() -> None:
        acknowledged[:] = [promises.copy(), None]

    as_new_process()
    try:
        with watching(top, failing):
            scenario.act(root, promises, note)
    except UserError as error:
        told = str(error)
    except OSError as error:
        return Fault(what, "", [f"raised {type(error).__name__} in place of a UserError: {error}"])
    problems = broken(root, acknowledged[0])
    if not told and failing.number != SHORT and acknowledged[1] is not None:
        problems.append("no error was told, and nothing was acknowledged")
    if told and acknowledged[1] is not None and _state(root) != acknowledged[1] and not DONE_BUT.search(told):
        problems.append(f"told that it failed, yet something changed: {told}")
    return Fault(what, told, problems or go_on(root, acknowledged[0]))
