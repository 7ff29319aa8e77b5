"""The runner of `make reliability`: nothing fails in silence, and an interrupted run leaves what it has."""

import importlib
import json
import sys
from types import SimpleNamespace

import pytest

from tests.reliability.__main__ import AREAS, main
from tests.reliability.case import Case, Measured


@pytest.fixture
def area(monkeypatch):
    """Registers cases as an area of the name `made_up`."""

    def register(*cases):
        monkeypatch.setitem(sys.modules, "tests.reliability.made_up", SimpleNamespace(CASES=list(cases)))
        return ("made_up",)

    return register


def good(folder, seed, quick):
    assert list(folder.iterdir()) == []
    (folder / "file").touch()
    return Measured(f"seed {seed}", True, "a|b")


def test_a_full_run_writes_both_files(tmp_path, area):
    areas = area(Case("one", "seed 3", good, "real processes"), Case("two", "seed 3", good, "in-process shim"))
    assert main(["--seed", "3"], tmp_path, areas) == 0
    first, second = json.loads((tmp_path / "runs" / "reliability.json").read_text())
    assert {key: first[key] for key in ("test", "target", "value", "ok", "seed", "detail")} == {
        "test": "one", "target": "seed 3", "value": "seed 3", "ok": True, "seed": 3, "detail": "a|b",
    }  # fmt: skip
    assert second["where"] == "in-process shim"
    page = (tmp_path / "RELIABILITY.md").read_text()
    assert "All 2 cases ran. 2 reached their target, 0 did not." in page
    assert f"| one | seed 3 | seed 3 | yes | real processes | 0 | {first['commit']} | a\\|b |" in page
    assert "Command: `make reliability ARGS='--seed 3'`" in page
    assert str(tmp_path) not in page
    assert list((tmp_path / "runs" / "reliability").iterdir()) == []


def test_a_case_that_raises_is_a_failed_case_and_the_next_one_runs(tmp_path, area):
    def bad(folder, seed, quick):
        raise RuntimeError(f"lost {folder}/x")

    areas = area(Case("one", "no loss", bad, "real processes"), Case("two", "seed 0", good, "real processes"))
    assert main([], tmp_path, areas) == 1
    first, second = json.loads((tmp_path / "runs" / "reliability.json").read_text())
    assert (first["ok"], first["value"], first["detail"]) == (False, "raised", "RuntimeError: lost FOLDER/x")
    assert second["ok"]
    assert "1 reached their target, 1 did not" in (tmp_path / "RELIABILITY.md").read_text()


def test_an_area_that_cannot_be_imported_is_a_failed_case(tmp_path):
    assert main([], tmp_path, ("no_such_area",)) == 1
    (only,) = json.loads((tmp_path / "runs" / "reliability.json").read_text())
    assert only["test"] == "the area no_such_area"
    assert "No module named" in only["detail"]


def test_an_interrupted_run_leaves_what_it_has_and_says_that_it_is_partial(tmp_path, area):
    def interrupted(folder, seed, quick):
        raise KeyboardInterrupt

    areas = area(Case("one", "seed 0", good, "real processes"), Case("two", "-", interrupted, "real processes"))
    with pytest.raises(KeyboardInterrupt):
        main([], tmp_path, areas)
    first, last = json.loads((tmp_path / "runs" / "reliability.json").read_text())
    assert first["ok"]
    assert (last["test"], last["value"], last["ok"]) == ("the run itself", "1 cases so far", False)
    assert "**Partial: 1 of 2 cases ran.**" in (tmp_path / "RELIABILITY.md").read_text()


@pytest.mark.parametrize("words", [["--quick"], ["--only", "made_up"]])
def test_only_a_full_run_touches_the_page(tmp_path, area, words):
    areas = (*area(Case("one", "-", good, "real processes")), "no_such_area")
    main(words, tmp_path, areas)
    assert not (tmp_path / "RELIABILITY.md").exists()
    assert (tmp_path / "runs" / "reliability.json").exists()


def test_a_run_in_parts_keeps_the_rows_of_other_areas_and_writes_the_page_once_all_are_there(tmp_path, area, monkeypatch):
    areas = (*area(Case("one", "seed 3", good, "real processes")), "second")
    monkeypatch.setitem(sys.modules, "tests.reliability.second", SimpleNamespace(CASES=[Case("two", "-", good, "real processes")]))
    main(["--only", "second", "--quick"], tmp_path, areas)
    main(["--only", "made_up", "--add"], tmp_path, areas)
    assert not (tmp_path / "RELIABILITY.md").exists(), "what a quick run found does not count"
    main(["--only", "second", "--add"], tmp_path, areas)
    assert [made["test"] for made in json.loads((tmp_path / "runs" / "reliability.json").read_text())] == ["one", "two"]
    page = (tmp_path / "RELIABILITY.md").read_text()
    assert "All 2 cases ran." in page
    assert "Command: `make reliability ARGS='--add --only second'`" in page


@pytest.mark.parametrize("name", AREAS)
def test_every_area_has_cases_with_names_of_their_own(name):
    cases = importlib.import_module(f"tests.reliability.{name}").CASES
    assert all(isinstance(case, Case) for case in cases)
    assert len({case.name for case in cases}) == len(cases)
