"""Every attack of the table is refused, or has no effect; none is executed."""

from __future__ import annotations

import pytest

from stages.data import trial
from tests.security import carried, folders, saves, texts
from tests.security.attack import Attack, attempt
from tests.tiny import tiny_model

TABLE = [*saves.ATTACKS, *folders.ATTACKS, *carried.ATTACKS, *texts.ATTACKS]


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("sound") / "model", hidden=16, layers=1)


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """A template has one second here, so that those that never end cost no more."""
    monkeypatch.setattr(trial, "SECONDS", 1.0)


@pytest.mark.parametrize("attack", TABLE, ids=[f"{attack.target}: {attack.name}" for attack in TABLE])
def test_attack(attack: Attack, tmp_path, sound, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)  # what an attacker names is found if anything looks for it
    outcome = attempt(attack, tmp_path / "place", sound)
    assert not outcome.wrong, outcome.wrong


def test_the_table_is_long_enough():
    assert len([attack for attack in TABLE if not attack.name.startswith("(control)")]) >= 60
