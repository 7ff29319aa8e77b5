"""The SFT benchmark's own arithmetic, and the rows it trains on."""

from __future__ import annotations

import json
from itertools import pairwise

from tests.bench import sft
from tests.bench.sft_cases import SFT_CASES, chains


def run(seconds, tokens, loss=1.0, peak=150, imports=50, device_peak=None):
    return {"seconds": seconds, "cpu_seconds": [s / 2 for s in seconds], "tokens": tokens, "imports": imports, "peak": peak, "eval_loss": loss, "device_peak": device_peak}


def test_medians_leave_out_each_processs_first_steps():
    """After three steps: 100 tokens in 1 s, 100 in 2 s, and of the second process 120 in 4 s: rates 100, 50, 30."""
    made = sft.summary([run([9, 9, 9, 1, 2], [1, 1, 1, 100, 100], loss=1.0), run([9, 9, 9, 4], [1, 1, 1, 120], loss=2.0, peak=250)])
    assert made["tokens_per_second"] == 50
    assert made["tokens_per_cpu_second"] == 100
    assert (made["seconds_per_step"], made["memory_mib"], made["eval_loss"]) == (2, 150, 1.5)
    assert sft.summary([run([9, 9, 9, 1], [1, 1, 1, 5], device_peak=7)])["memory_mib"] == 7


def test_an_entry_has_our_figures_over_the_peers():
    made = sft.entry(SFT_CASES["vocab32k/packed"], {"ours": [run([9, 9, 9, 1], [1, 1, 1, 60])], "peer": [run([9, 9, 9, 2], [1, 1, 1, 60], loss=1.25, peak=250)]})
    assert (made["case"], made["speed_ratio"], made["memory_ratio"]) == ("vocab32k/packed", 2.0, 0.5)
    assert (made["eval_loss"], made["peer_eval_loss"]) == (1.0, 1.25)
    assert json.loads(json.dumps(made))["settings"]["tokens"] == [24, 256]


def test_rows_are_chains_of_a_length_within_the_bounds():
    rows = chains(200, (24, 256), 512)
    lengths = [len(row) for row in rows]
    assert min(lengths) >= 24
    assert max(lengths) <= 255
    assert 60 < sum(lengths) / 200 < 110  # 24 + a quarter of 231 is 82
    follows: dict[str, set[str]] = {}
    for row in rows:
        for word, after in pairwise(row):
            follows.setdefault(word, set()).add(after)
    assert max(len(words) for words in follows.values()) == 3
