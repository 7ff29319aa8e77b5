"""Leases: how long they count, who gives them back, and what is kept meanwhile."""

import os
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta

import pytest

from stages.registry import Registry, gc, leases
from stages.registry.gc import Rules
from tests.unit.registry_samples import ROOT, publish
from tests.unit.test_registry_gc import collect


@pytest.fixture
def registry(tmp_path, monkeypatch):
    monkeypatch.setattr("stages.registry.provenance._git", lambda *args: None)
    return Registry(tmp_path / "registry")


def hold_elsewhere(registry, checkpoint, then="time.sleep(60)"):
    """A process that holds a lease; returned once it does."""
    code = f"""
import sys, time, os, signal
from stages.registry import Registry
registry = Registry({str(registry.root)!r})
held = registry.lease(registry.resolve({checkpoint.ref!r}), "ppo/demo")
print("held", flush=True)
{then}
"""
    child = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "held\n"
    return child


def test_a_lease_lapses_with_its_holder_and_not_before(registry):
    first = publish(registry)
    publish(registry)
    child = hold_elsewhere(registry, first)
    (lease,) = leases.leases(registry.root)
    assert (lease.checkpoint_id, lease.holder.pid, lease.lapsed(datetime.now(UTC))) == (first.id, child.pid, False)
    assert gc.make_plan(registry, Rules(keep=1)).why[first.id] == f"in use: process {child.pid} on {lease.holder.host}, ppo/demo"
    os.kill(child.pid, signal.SIGKILL)
    while not lease.lapsed(datetime.now(UTC)):  # a zombie holds nothing either
        time.sleep(0.01)
    child.wait()
    assert lease.lapsed(datetime.now(UTC))
    done = collect(registry)
    assert ([item.id for item in done.trashed], list((registry.root / "leases" / first.id).iterdir())) == ([first.id], [])


def test_a_process_that_ends_gives_its_leases_back(registry):
    child = hold_elsewhere(registry, publish(registry), then="")
    assert child.wait() == 0
    assert leases.leases(registry.root) == []


def test_a_lease_from_another_machine_lapses_by_its_own_words_only(registry):
    checkpoint = publish(registry)
    held = leases.take(registry.root, [checkpoint.id], "ppo")
    file = held.files[0]
    body = leases.unseal(file.read_bytes())
    body.pop("hash")
    body["holder"] |= {"boot": "000000000000", "pid": 2**30}  # another kernel: nothing can be proved
    file.write_bytes(leases.seal(body))
    os.utime(file, (0, 0))
    (lease,) = leases.leases(registry.root)
    now = datetime.now(UTC)
    assert not lease.lapsed(now)
    assert not lease.lapsed(now + leases.LASTS)
    assert lease.lapsed(now + leases.LASTS + leases.CLOCKS_DIFFER + timedelta(seconds=5))
    body["holder"] = leases.this_process().to_json() | {"start": 1}  # this PID, used again by another process
    file.write_bytes(leases.seal(body))
    assert leases.leases(registry.root)[0].lapsed(now)
    held.give_back()


@pytest.mark.parametrize("content", ["", "{", "\0" * 200])
def test_a_lease_that_cannot_be_read_counts_for_as_long_as_one_written_when_its_file_was(registry, content):
    """A power cut may leave such a file. It counted for ever, and its checkpoint was never collected."""
    first = publish(registry)
    publish(registry)
    held = leases.take(registry.root, [first.id], "ppo", renewed=False)
    (file,) = held.files
    file.write_text(content)
    lasts, now = leases.LASTS + leases.CLOCKS_DIFFER, datetime.now(UTC)
    os.utime(file, (0, 0))
    assert not leases.leases(registry.root)[0].lapsed(now + lasts - timedelta(minutes=1)), "its name says that it was taken just now"
    renewed = now + timedelta(days=2)  # under the same name
    os.utime(file, (renewed.timestamp(), renewed.timestamp()))
    until = renewed + lasts
    plan = gc.make_plan(registry, Rules(keep=1), at=until - timedelta(minutes=1))
    assert plan.why[first.id].startswith(f"in use: the lease {file} cannot be read (")
    assert plan.why[first.id].endswith(f") and counts until {until:%Y-%m-%d %H:%M} UTC; delete that file if no job uses the checkpoint")
    plan = gc.make_plan(registry, Rules(keep=1), at=until + timedelta(minutes=1))
    assert [item.id for item in plan.going] == [first.id]
    assert [lease.file for lease in plan.lapsed] == [file]


def test_a_lease_is_renewed_until_it_is_given_back(registry, monkeypatch):
    checkpoint = publish(registry)
    monkeypatch.setattr(leases, "RENEWED", timedelta(seconds=0.02))
    held = leases.take(registry.root, [checkpoint.id], "ppo")
    first = leases.leases(registry.root)[0].expires
    held.files[0].unlink()  # removed by somebody, or by gc after this process was stopped for hours
    deadline = time.monotonic() + 20
    while not leases.leases(registry.root) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert leases.leases(registry.root)[0].expires >= first
    held.give_back()
    time.sleep(0.2)
    assert leases.leases(registry.root) == []


def test_a_registry_that_may_only_be_read_costs_a_warning_and_no_more(registry, monkeypatch, capsys):
    checkpoint = publish(registry)

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(leases, "_write", refuse)
    assert registry.lease(checkpoint, "eval") is None
    assert "warning: no lease could be written" in capsys.readouterr().err
