"""The saves of a run under power cuts and kills; `make reliability` looks at every call."""

import random

import pytest

from tests.faults import cuts, kills
from tests.faults.scenarios import SAVES, SCENARIOS, STATES, light


@pytest.fixture(autouse=True)
def _light():
    with light():
        yield


@pytest.mark.parametrize("scenario", [SAVES, SCENARIOS[-1]], ids=lambda item: item.name)
def test_a_power_cut_anywhere_keeps_what_was_acknowledged(tmp_path, scenario):
    """Of saves: nobody synced the names of OUTPUT/resume and of what lies above it, so that all of them could be gone."""
    verdict = cuts.cut_everywhere(scenario, tmp_path, seed=0, most=4)
    assert verdict.disks > 10
    assert verdict.problems == []


def test_each_fsync_of_a_save_that_is_deleted_is_found_out(tmp_path):
    with cuts.in_memory(tmp_path) as folder:
        sites = dict.fromkeys(cuts.record(SAVES, folder / "recorded")[1])
        assert [site.split()[-1] for site in sites] == ["new_staging", "recorded", "seal", "commit", "commit"]
        for site in sites:
            points, _ = cuts.record(SAVES, folder / "recorded", skip=site)
            assert cuts.look(points[-3:], folder / "disk", random.Random(0), 12, stop=True).problems, site


@pytest.mark.parametrize("scenario", [SAVES, STATES], ids=lambda item: item.name)
def test_whoever_is_killed_leaves_what_was_acknowledged(tmp_path, scenario):
    found = list(kills.deaths(scenario, tmp_path, every=31))
    assert found
    assert [death for death in found if death.problems] == []
