"""`align sweep` of real SFT on a tiny model: two trials at once, the best config, its checkpoint and the plots."""

from __future__ import annotations

import json

from configs.load import load
from launch.cli import main
from stages.registry import Registry
from tests.stage.runs import workspace


def test_two_trials_of_sft(tmp_path, capfd):
    workspace(tmp_path)
    file = tmp_path / "sft.yaml"
    file.write_text(
        f"name: tiny\nregistry: {tmp_path}/registry\noutput: {tmp_path}/out\ninit_from: {tmp_path}/base\ndata: {tmp_path}/sft.jsonl\nmax_length: 128\n"
        "split: {validation: 0.2, test: 0.1}\ntrain: {max_steps: 9, batch_size: 8, micro_batch_size: 8, learning_rate: 1e-5}\n"
    )
    words = ["sweep", str(file), "--stage", "sft", "--space", "train.learning_rate=1e-5,1e-2", "--sampler", "grid", "--jobs", "2", "--pruner", "median", "--json"]
    assert main(words) == 0
    found = json.loads(capfd.readouterr().out)
    rows = {row["values"]["sft.train.learning_rate"]: row for row in found["trials"]}
    assert {row["state"] for row in rows.values()} == {"done"}, "of two trials none is below a median of three"
    assert found["best"]["values"]["sft.train.learning_rate"] > 1e-5
    assert found["best"]["value"] < rows[1e-5]["value"] - 0.5
    assert rows[1e-5]["evaluations"] == 9, "evaluated often enough to be ended early"
    checkpoint = Registry(tmp_path / "out" / "sweep" / "registry").resolve(found["best"]["published"]["sft"])
    assert checkpoint.info("metrics")["loss"] == found["best"]["value"]
    assert checkpoint.info("test") is None, "what is chosen from has not looked at the test part"
    assert load(found["config"], "sft").evaluation.test
    assert load(found["config"], "sft").train.learning_rate == found["best"]["values"]["sft.train.learning_rate"]
    assert {"history.png", "slices.png", "curves.png"} == {path.name for path in (tmp_path / "out" / "sweep" / "plots").iterdir()}
    assert main(["sweep", "show", str(tmp_path / "out" / "sweep")]) == 0
    out = capfd.readouterr().out
    assert "done · as configured" in out
    assert f"run it:   align sft --config {tmp_path}/out/sweep/best.yaml" in out
