"""The benchmark for a GPU goes its whole way on a CPU, and refuses to call that a measurement."""

from __future__ import annotations

import json

import pytest
import torch

from tests.bench import gpu, gpu_cases


def test_every_case_runs_with_a_tiny_model(tmp_path, capsys):
    out = tmp_path / "gpu.json"
    assert gpu.main(["--tiny", "--out", str(out)]) == 0
    records = {record["case"]: record for record in json.loads(out.read_text())}
    assert list(records) == list(gpu_cases.CASES)
    for case, record in records.items():
        assert record["tokens_per_second"] == pytest.approx(record["tokens_per_step"] / record["step_seconds"])
        assert record["steps"] == (3 if case == "ppo" else 4)
        if case != gpu_cases.PEER:
            assert abs(record["plan_error"]) < 0.15
    assert records["sft"]["tokens_per_step"] == 2 * 25  # two rows of 12 + 12 words and EOS
    assert records[gpu_cases.PEER]["tokens_per_step"] == 2 * 25
    table = capsys.readouterr().out
    assert all(f"\n{case} " in table for case in gpu_cases.CASES)


def test_without_a_gpu_it_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--out", str(tmp_path / "gpu.json")]) == 2
    assert "torch finds none here" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
