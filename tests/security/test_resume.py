"""A real stage, interrupted, whose save an attacker has changed together with its list of hashes."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.errors import UserError
from tests.security.attack import Place
from tests.security.saves import reseal
from tests.stage.runs import run, run_until, settings, workspace


@pytest.fixture
def interrupted(tmp_path):
    """A run that crashed at step 3, with saves at 1 and 2; returns its config."""
    values = settings(workspace(tmp_path, rows=40), "sft", {"max_steps": 4, "save_every": 1})
    run_until("sft", values, 2)
    return values


def test_a_pickle_that_would_run_code_is_not_opened(interrupted, tmp_path):
    """And a save holds no training_args.bin, in which transformers keeps tokens."""
    resume = Path(interrupted["output"]) / "resume"
    save = resume / "checkpoint-2"
    assert not list(resume.rglob("training_args.bin"))
    sound = (save / "optimizer.pt").read_bytes()
    place = Place(tmp_path, tmp_path)
    place.torch_save(save / "optimizer.pt")
    reseal(save)
    with pytest.raises(UserError, match=r"optimizer\.pt is not opened: it would call 'posix\.mkdir'"):
        run("sft", interrupted)
    assert not place.canary.exists()

    (save / "optimizer.pt").write_bytes(sound)
    reseal(save)
    assert run("sft", interrupted).ref == "sft/tiny@1"
