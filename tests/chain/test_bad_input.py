"""Bad input of every kind: one clear error, exit code 2, no traceback, nothing lost and nothing half-written.

The cases are listed in bad_cases.py. Each is an `align` command; the process of its stage is replaced by a call of the same entry point,
but for the cases at the end, which run as they do for a person.
"""

from __future__ import annotations

import shutil

import pytest

from launch.cli import main
from tests.chain.bad_cases import CASES
from tests.chain.bad_world import Case, World, make_world, run_child_here


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> World:
    """A world in which nothing is wrong."""
    return make_world(tmp_path_factory.mktemp("sound"))


@pytest.fixture
def world(sound: World, tmp_path, monkeypatch) -> World:
    """A copy of it, to spoil, on a machine without network."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for constant in ("huggingface_hub.constants.HF_HUB_OFFLINE", "datasets.config.HF_HUB_OFFLINE"):
        monkeypatch.setattr(constant, True)  # they have read the environment long ago
    shutil.copytree(sound.folder, tmp_path / "world")
    return World(tmp_path / "world")


def check_message(case: Case, out: str, err: str) -> None:
    """One error, which says what it must."""
    assert "Traceback" not in out + err
    assert sum(line.startswith("error: ") for line in err.splitlines()) == 1, err
    message = err[err.index("error: ") :]
    missing = [words for words in case.says if words not in message]
    assert not missing, f"the message does not say {missing}:\n{message}"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_bad_input(case: Case, world: World, monkeypatch, capfd) -> None:
    monkeypatch.setattr("launch.process.run_child", run_child_here)
    monkeypatch.setattr("launch.chain.runner.run_child", run_child_here)
    argv = case.arrange(world)
    before = world.files()
    capfd.readouterr()
    assert main(argv) == 2
    out, err = capfd.readouterr()
    check_message(case, out, err)
    assert world.written_since(before) == []
