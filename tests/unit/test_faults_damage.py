"""Damage to files, storage faults, random kills and crowds, each small; `make reliability` runs the whole."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from stages.registry import Registry
from stages.registry.sealing import seal, unseal
from tests.faults import flips, random_kills, storage_faults
from tests.faults.promises import Promises
from tests.faults.scenarios import SCENARIOS, light
from tests.reliability import faults as reliability

ROOT = Path(__file__).resolve().parents[2]


def test_a_sample_of_all_flips_is_found_by_the_deep_check(tmp_path):
    checkpoint = flips.small(tmp_path / "registry")
    tried, missed = flips.every_bit(checkpoint, every=5)
    assert tried > 1000
    assert missed == []
    assert flips.random_bits(flips.large(tmp_path / "registry", 2**20, seed=0), 20, seed=0) == (20, [])


def test_every_truncation_is_found_by_the_quick_check(tmp_path):
    """The last byte of the manifest too, which is a line end."""
    tried, missed = flips.truncations(flips.small(tmp_path / "registry"), 10**6, seed=0)
    assert tried > 1000
    assert missed == []


@pytest.mark.parametrize(("old", "new"), [(b"\\u001f", b"\\u001F"), (b"}\n", b"}"), (b"{", b"{ "), (b'"a":1', b'"a":2,"a":1')], ids=["escape", "line end", "space", "twice"])
def test_other_bytes_of_the_same_meaning_are_damage(old, new):
    content = seal({"a": 1, "text": "\x1f"})
    assert unseal(content)["text"] == "\x1f"
    assert old in content
    with pytest.raises(ValueError, match="does not match the hash"):
        unseal(content.replace(old, new, 1))


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda item: item.name)
def test_a_full_or_broken_disk_is_told_and_changes_nothing(tmp_path, scenario):
    with light():
        found = list(storage_faults.faults(scenario, tmp_path, every=11))
    assert any(fault.told for fault in found)
    assert [fault for fault in found if fault.problems] == []


def test_an_alias_that_was_moved_is_not_told_to_have_stayed_where_it_was(tmp_path):
    """Its draft could not be removed: that was told as a failure with the registry unchanged."""
    alias = next(item for item in SCENARIOS if item.name == "alias")
    seen = storage_faults.calls(alias, tmp_path / "whole")
    promises = storage_faults.prepared(alias, tmp_path)
    last = max(at for at, call in enumerate(seen, 1) if call.name == "unlink")
    with light():
        fault = storage_faults.run(alias, storage_faults.copied(tmp_path), promises, storage_faults.Failing(last, 5, False), "EIO")
    assert (fault.told, fault.problems) == ("", [])


@pytest.mark.parametrize(("name", "words"), [("random_kills", ["8", "0"]), ("crowd", ["3", "4", "0"])])
def test_real_processes(tmp_path, name, words):
    done = subprocess.run(
        [sys.executable, "-m", f"tests.faults.{name}", str(tmp_path), *words],
        cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    if name == "crowd":
        assert (made["publish"], made["move"]) == ([], [])
    else:
        assert (made["kills"], made["problems"]) == (8, [])
        draw = random.Random(0)
        due = [(draw.randint(0, random_kills.MOST), draw.uniform(0, 1))[0] for _ in range(8)]  # what the publishers had acknowledged when their kills were due
        assert made["checkpoints"] >= sum((count + 1) // 2 for count in due) > 0
        assert made["moves"] >= sum(count // 2 for count in due) > 0


def test_a_publisher_that_acknowledges_what_is_not_there_is_found_out(tmp_path, monkeypatch):
    def publishing(root, pipe):
        Registry(root)
        for words in ("ready", "checkpoint 20260101t000000-0123456789ab sft/demo@1", "alias 20260101t000000-0123456789ab", "checkpoint 20260101t000000-0123456789ac sft/demo@2"):
            os.write(pipe, f"0 {words}\n".encode())
        signal.pause()

    monkeypatch.setattr(random_kills, "publishing", publishing)
    promises = Promises(opened=True)
    said = random_kills.kill_after(tmp_path / "registry", 3, 0.0)
    assert [words[0] for words in said] == ["ready", "checkpoint", "alias", "checkpoint"]
    promises.checkpoints = {said[1][1]: said[1][2]}
    promises.aliases = {"production": [said[2][1]]}
    wrong, _ = random_kills.look(tmp_path / "registry", promises, set())
    assert wrong == ["acknowledged, and lost: sft/demo@1", "an acknowledged move of the alias is lost, or out of order"]


@pytest.mark.parametrize(("checkpoints", "moves", "ok"), [(500, 100, True), (499, 100, False), (500, 99, False)])
def test_random_kills_of_publishers_that_had_acknowledged_little_show_nothing(tmp_path, monkeypatch, checkpoints, moves, ok):
    made = {"kills": 1000, "publishing": 500, "moving": 500, "checkpoints": checkpoints, "moves": moves, "unacknowledged": 0, "leftovers": 0, "problems": []}
    monkeypatch.setattr(reliability, "_module", lambda *words: made)
    assert reliability.kill_at_random(tmp_path, 0, False).ok is ok
