"""SIGKILL at calls of the registry's operations; `make reliability` does it at every one."""

import shutil

import pytest

from tests.faults import kills
from tests.faults.scenarios import SCENARIOS, light


@pytest.fixture(autouse=True)
def _light():
    with light():
        yield


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda item: item.name)
def test_whoever_is_killed_leaves_what_was_acknowledged_and_nothing_invalid(tmp_path, scenario):
    found = list(kills.deaths(scenario, tmp_path, every=11))
    assert found
    assert [death for death in found if death.problems] == []


def test_the_shim_sees_every_call_of_a_publication(tmp_path):
    names = [call.name for call in kills.calls(SCENARIOS[2], tmp_path / "seen")]
    assert {"mkdir", "open", "write", "fsync", "link", "unlink", "rename", "read"} <= set(names)
    assert names.count("rename") >= 1
    assert names.count("write") >= 6  # four files, the claim, the manifest


def test_who_writes_a_checkpoint_under_its_final_name_is_found_out(tmp_path):
    found = list(kills.deaths(kills.Scenario("careless", SCENARIOS[2].prepare, _careless), tmp_path))
    assert any("visible" in problem for death in found for problem in death.problems)


def _careless(root, promises, note):
    folder = root / "checkpoints" / "20260101t000000-0123456789ab"
    folder.mkdir()
    (folder / "manifest.json").write_text("{}")
    shutil.rmtree(folder)
