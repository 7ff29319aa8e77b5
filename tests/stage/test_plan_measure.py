"""What the plan says against what the real stage allocates, and that measuring leaves nothing behind."""

from __future__ import annotations

import json

import pytest

from launch.cli import main
from tests.stage.runs import settings, workspace


@pytest.mark.parametrize(("chunk", "within"), [(None, 0.1), ("auto", 0.15)])
def test_the_real_stage_allocates_what_is_planned_and_publishes_nothing(tmp_path, capsys, chunk, within):
    """A loss in chunks allocates less, so that what the plan takes for the longest (rows, completions) is a larger share of the whole."""
    folder = workspace(tmp_path)
    values = settings(folder, "sft", {"loss_chunk": chunk}, lora={"rank": 4}, split={"validation": 0, "test": 0})
    file = tmp_path / "sft.yaml"
    file.write_text(json.dumps(values))
    capsys.readouterr()
    assert main(["plan", str(file), "--gpus", "1xCPU", "--measure", "--json"]) == 0
    (stage,) = json.loads(capsys.readouterr().out.splitlines()[-1])["stages"]
    assert abs(stage["peak_bytes"] - stage["measured_bytes"]) <= within * stage["measured_bytes"]
    assert stage["measured_hours"] > 0
    assert not list((tmp_path / "registry").glob("checkpoints/*/manifest.json"))
    assert not (tmp_path / "out-sft").exists()


def test_a_stage_that_cannot_start_is_said(tmp_path, capsys):
    folder = workspace(tmp_path)
    values = settings(folder, "sft", trainer={"optim": "no_such_optimizer"}, split={"validation": 0, "test": 0})
    file = tmp_path / "sft.yaml"
    file.write_text(json.dumps(values))
    assert main(["plan", str(file), "--gpus", "1xCPU", "--measure"]) == 2
    assert "--measure: stage sft ended with code" in capsys.readouterr().err
