"""The PPO benchmark's own arithmetic, its JSON and table, and one measurement of our side with next to no work."""

from __future__ import annotations

import io
import json

import pytest

from tests.bench import ppo
from tests.bench.cases import CASES, prepare, tiny
from tests.bench.ours import measure
from tests.bench.results import entry, model_flops, peak_share, rows, summary, table

CASE = {
    "name": "toy", "samples": 8, "completion_tokens": 5, "prompt_tokens": [2, 4], "epochs": 2,
    "model": {"hidden_size": 4, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 6, "num_hidden_layers": 3, "vocab_size": 10},
}  # fmt: skip


def run(*seconds, peak=150, imports=50, **changes):
    updates = [{"seconds": s, "cpu_seconds": s / 2, "rollout": s / 4, "scoring": s / 4, "update": s / 2} for s in seconds]
    return {"updates": updates, "imports": imports, "peak": peak, "device": None, "device_peak": None} | changes


def test_medians_leave_out_each_processs_first_update():
    made = summary(CASE, [run(99.0, 1.0, 2.0), run(99.0, 4.0, 16.0, peak=250), run(99.0, 2.0)])
    assert made["all_seconds"] == [1.0, 2.0, 4.0, 16.0, 2.0]
    assert made["seconds_per_update"] == 2.0
    assert (made["samples_per_second"], made["tokens_per_second"]) == (4.0, 20.0)
    assert (made["rollout_seconds"], made["update_seconds"], made["cpu_seconds_per_update"]) == (0.5, 1.0, 1.0)
    assert (made["memory_mib"], made["peak_mib"]) == (100, 150)
    assert "share_of_peak_flops" not in made


def test_on_a_gpu_memory_is_the_cards_and_the_share_of_its_peak_is_reported():
    made = summary(CASE, [run(9.0, 2.0, device="NVIDIA H100 80GB HBM3", device_peak=7)])
    assert made["memory_mib"] == 7
    assert made["share_of_peak_flops"] == model_flops(CASE) / 2.0 / 989e12
    assert peak_share(CASE, 2.0, "a card nobody knows") is None


def test_flops_by_hand():
    """Attention 2·4·2·(2+1) = 48 and MLP 3·4·6 = 72 weights a layer: trunk 360, head 40. 40 completion and 24 prompt tokens:
    one forward pass is 2·360·64 = 46,080 in the trunk and 2·40·40 = 3,200 in the head. Rollout 49,280; scoring 4·46,080 + 2·3,200
    = 190,720; update 2·3·(2·46,080 + 3,200) = 572,160."""
    assert model_flops(CASE) == 49_280 + 190_720 + 572_160


def test_an_entry_has_the_ratios_and_whether_they_reach_their_targets():
    made = entry(CASE, ("ours", "full"), ("peer", "full"), [run(9.0, 2.0)], [run(9.0, 6.0, peak=450)])
    assert (made["case"], made["speed_ratio"], made["cpu_speed_ratio"], made["memory_ratio"]) == ("toy", 3.0, 3.0, 0.25)
    assert made["peak_ratio"] == pytest.approx(150 / 450)
    assert json.loads(json.dumps([made])) == [made]
    first, second = rows([made])
    assert first[-1] == "reached ≥ 2x, reached ≤ 0.5x"
    assert (first[0], second[0], second[-1]) == ("toy", "", "")
    missed = entry(CASE, ("ours", "lora"), ("peer", "full"), [run(9.0, 2.1)], [run(9.0, 6.0, peak=300)])
    assert rows([missed])[0][-1] == "MISSED ≥ 3x, MISSED ≤ 0.35x"
    assert rows([entry(CASE, ("ours", "lora"), ("peer", "lora"), [run(9.0, 2.0)], [run(9.0, 2.0)])])[0][-1] == "no target"
    from rich.console import Console

    text = io.StringIO()
    Console(file=text, width=200).print(table([made, missed]))
    assert "TRL 1.12, four models" in text.getvalue()
    assert "3.00x" in text.getvalue()


def test_without_the_peer_the_command_says_how_to_get_it(tmp_path, capsys):
    assert ppo.main(["--peer", str(tmp_path)]) == 2
    assert "trl==1.12.0" in capsys.readouterr().err


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_our_side_measures_every_update_and_its_parts(tmp_path, mode):
    job = prepare(tmp_path / "job", tiny(CASES["stories260K"]))
    assert len(job["prompt_ids"]) == 4
    assert all(3 <= len(ids) <= 6 for ids in job["prompt_ids"])
    made = measure(job, mode)
    assert len(made["updates"]) == 2
    for update in made["updates"]:
        assert 0 < update["rollout"] + update["scoring"] + update["update"] <= update["seconds"] + 1e-6
        assert update["cpu_seconds"] > 0
    assert made["peak"] >= made["imports"] > 0
    made = summary(job["case"], [made])
    assert made["samples_per_second"] > 0
