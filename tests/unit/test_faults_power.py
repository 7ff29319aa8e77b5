"""The model of power cuts, and the registry under it; `make reliability` looks at every call."""

import os
import random

import pytest

from stages.registry.storage import fsync_dir
from tests.faults import cuts
from tests.faults.power import Recorder, build, outcomes
from tests.faults.promises import Promises
from tests.faults.scenarios import SCENARIOS, light
from tests.faults.shim import watching

OPEN, FIRST, PUBLISH, ALIAS = SCENARIOS[:4]


@pytest.fixture(autouse=True)
def _light():
    with light():
        yield


def disks(top, work, tmp_path):
    """Every disk that a power cut after `work` may leave: path -> content."""
    recorder = Recorder(top, Promises())
    with watching(top, recorder):
        work()
    found = []
    for outcome in outcomes(recorder.points[-1].disk, 1000, random.Random(0)):
        place = tmp_path / "disk"
        build(recorder.points[-1].disk, outcome, place)
        found.append({path.relative_to(place).as_posix(): path.read_bytes() for path in place.rglob("*") if path.is_file()})
    return found


def test_what_is_not_synced_may_be_lost_torn_or_zero(tmp_path):
    top = tmp_path / "top"
    top.mkdir()
    found = disks(top, lambda: (top / "file").write_bytes(b"abcd"), tmp_path)
    contents = {item.get("file") for item in found}
    assert {None, b"abcd", b"", bytes(4)} <= contents
    assert all(len(item) <= 4 for item in contents if item)


def test_a_synced_file_may_lose_its_name_and_nothing_else(tmp_path):
    top = tmp_path / "top"
    top.mkdir()

    def work():
        with open(top / "file", "wb") as file:
            file.write(b"abcd")
            file.flush()
            os.fsync(file.fileno())

    assert {item.get("file") for item in disks(top, work, tmp_path)} == {None, b"abcd"}


def test_a_rename_is_seen_before_the_content_unless_that_was_synced(tmp_path):
    top = tmp_path / "top"
    top.mkdir()
    (top / "file").write_bytes(b"old")

    def work():
        (top / "draft").write_bytes(b"new!")
        os.rename(top / "draft", top / "file")
        fsync_dir(top)

    found = disks(top, work, tmp_path)
    assert {b"new!", b"", bytes(4)} <= {item["file"] for item in found}
    assert not any("draft" in item for item in found)


def test_two_folders_are_synced_each_for_itself(tmp_path):
    top = tmp_path / "top"
    (top / "a").mkdir(parents=True)
    (top / "b").mkdir()
    (top / "a" / "file").write_bytes(b"x")

    def work():
        os.link(top / "a" / "file", top / "b" / "file")
        os.unlink(top / "a" / "file")
        fsync_dir(top / "a")

    assert {tuple(sorted(item)) for item in disks(top, work, tmp_path)} == {("b/file",), ()}  # lost: b was never synced


@pytest.mark.parametrize("scenario", [FIRST, ALIAS], ids=lambda item: item.name)
def test_a_power_cut_anywhere_keeps_what_was_acknowledged(tmp_path, scenario):
    verdict = cuts.cut_everywhere(scenario, tmp_path, seed=0, most=8)
    assert verdict.disks > 10
    assert verdict.problems == []


@pytest.mark.parametrize(("scenario", "at"), [(OPEN, -1), (PUBLISH, -1), (FIRST, 0)], ids=lambda item: getattr(item, "name", item))
def test_what_a_killed_process_left_unsynced_is_synced_by_the_next_one(tmp_path, scenario, at):
    """Killed before an fsync: of a folder just made, of the name of a checkpoint that a second process then puts an alias on."""
    with cuts.in_memory(tmp_path) as folder:
        found = list(cuts.seconds(scenario, folder, only="fsync"))
        for number, after in found[at:] if at else found[:4]:
            points, _ = cuts.record(scenario, folder / "recorded", die_at=number, after=after)
            assert cuts.look(points[-1:], folder / "disk", random.Random(0), 12).problems == []


@pytest.mark.parametrize("line", ["commit.py", "link_new", "write_exclusive"])
def test_a_deleted_fsync_is_found_out(tmp_path, line):
    with cuts.in_memory(tmp_path) as folder:
        _, sites = cuts.record(PUBLISH, folder / "recorded")
        for site in dict.fromkeys(site for site in sites if line in site):
            points, _ = cuts.record(PUBLISH, folder / "recorded", skip=site)
            assert cuts.look(points[-3:], folder / "disk", random.Random(0), 12, stop=True).problems, site
