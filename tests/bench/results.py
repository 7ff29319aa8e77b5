"""From what the processes measured to medians, ratios, the JSON entries and the table."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

TARGETS = {("full", "full"): (2.0, 0.5), ("lora", "full"): (3.0, 0.35)}  # least speed ratio, greatest memory ratio
PARTS = ("rollout", "scoring", "update")
# Dense bf16 FLOP/s of the cards' data sheets, by a part of the name that torch reports.
PEAK_FLOPS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "A10": 125e12, "4090": 165e12}


def summary(case: dict[str, Any], runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the updates of all processes, each process's first one left out; memory over the processes.

    `memory_mib` is what the benchmark compares: on a GPU what tensors held there at most, else the peak of the resident
    memory less what was resident after an update of a toy, when everything had been imported and every thread started.
    """
    updates = [update for run in runs for update in run["updates"][1:]]
    seconds = median(update["seconds"] for update in updates)
    tokens = case["samples"] * case["completion_tokens"]
    above = [run["peak"] - run["imports"] for run in runs]
    on_device = [run["device_peak"] for run in runs if run["device_peak"] is not None]
    made = {
        "samples_per_second": case["samples"] / seconds, "tokens_per_second": tokens / seconds, "seconds_per_update": seconds,
        "cpu_seconds_per_update": median(update["cpu_seconds"] for update in updates),
        **{f"{part}_seconds": median(update[part] for update in updates) for part in PARTS},
        "memory_mib": median(on_device or above), "peak_mib": median(run["peak"] for run in runs), "imports_mib": median(run["imports"] for run in runs),
        "processes": len(runs), "updates": len(updates), "all_seconds": [update["seconds"] for update in updates],
    }  # fmt: skip
    share = peak_share(case, seconds, next((run["device"] for run in runs if run.get("device")), None))
    return made | ({"share_of_peak_flops": share} if share is not None else {})


def entry(case: dict[str, Any], ours: tuple[str, str], peer: tuple[str, str], our_runs: Sequence[dict[str, Any]], peer_runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One element of the JSON list. Ratios are ours over the peer's: samples per second, and memory."""
    mine, theirs = summary(case, our_runs), summary(case, peer_runs)
    modes = (ours[1], peer[1])
    return {
        "case": case["name"], "ours_mode": modes[0], "peer_mode": modes[1], "speed_ratio": mine["samples_per_second"] / theirs["samples_per_second"],
        "cpu_speed_ratio": theirs["cpu_seconds_per_update"] / mine["cpu_seconds_per_update"],
        "memory_ratio": mine["memory_mib"] / theirs["memory_mib"], "peak_ratio": mine["peak_mib"] / theirs["peak_mib"],
        "targets": list(TARGETS[modes]) if modes in TARGETS else None, "ours": mine, "peer": theirs, "settings": case,
    }  # fmt: skip


def model_flops(case: dict[str, Any]) -> float:
    """Arithmetic that one update of PPO with four models needs, in floating-point operations, attention scores left out.

    Two operations per weight and token in a forward pass, four more in a backward pass; the output head counts at completion
    positions. Rollout: the policy. Scoring: policy, reference, value, reward. Update: policy and value, forward and backward.
    """
    m = case["model"]
    head = m["vocab_size"] * m["hidden_size"]
    width = m["hidden_size"] // m["num_attention_heads"]
    attention = 2 * m["hidden_size"] * width * (m["num_attention_heads"] + m["num_key_value_heads"])
    trunk = m["num_hidden_layers"] * (attention + 3 * m["hidden_size"] * m["intermediate_size"])
    completion = case["samples"] * case["completion_tokens"]
    tokens = completion + case["samples"] * sum(case["prompt_tokens"]) / 2
    forward_trunk, forward_head = 2 * trunk * tokens, 2 * head * completion
    scoring = 4 * forward_trunk + 2 * forward_head
    return forward_trunk + forward_head + scoring + case["epochs"] * 3 * (2 * forward_trunk + forward_head)


def peak_share(case: dict[str, Any], seconds: float, device: str | None) -> float | None:
    """The share of the card's bf16 peak that the model's arithmetic used; None without a GPU, or for a card that is not known."""
    peak = next((flops for name, flops in PEAK_FLOPS.items() if device and name in device), None)
    return model_flops(case) / seconds / peak if peak else None


def verdict(made: dict[str, Any]) -> str:
    """Whether an entry reaches its targets."""
    if made["targets"] is None:
        return "no target"
    speed, memory = made["targets"]
    return f"{'reached' if made['speed_ratio'] >= speed else 'MISSED'} ≥ {speed:g}x, {'reached' if made['memory_ratio'] <= memory else 'MISSED'} ≤ {memory:g}x"


def rows(entries: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The table's cells: two lines per entry, ours and the peer's."""
    cells = []
    for made in entries:
        for side, mode in (("ours", made["ours_mode"]), ("peer", made["peer_mode"])):
            s = made[side]
            last = [f"{made['speed_ratio']:.2f}x ({made['cpu_speed_ratio']:.2f}x CPU)", f"{made['memory_ratio']:.2f}x", verdict(made)] if side == "ours" else ["", "", ""]
            parts = " + ".join(f"{s[f'{part}_seconds']:.2f}" for part in PARTS)
            who = {"ours": "ours", "peer": "TRL 1.12"}[side] + {"full": ", four models", "lora": ", one backbone" if side == "ours" else ", peft"}[mode]
            gpu = f" ({s['share_of_peak_flops']:.0%} of peak)" if "share_of_peak_flops" in s else ""
            cells.append([made["case"] if side == "ours" else "", who, f"{s['samples_per_second']:.2f}", f"{s['tokens_per_second']:.0f}{gpu}", parts, f"{s['memory_mib']:.0f}", *last])
    return cells


def table(entries: Sequence[dict[str, Any]]) -> Any:
    """A rich table of all entries."""
    from rich.table import Table

    made = Table(title="PPO, medians")
    for name in ("case", "who", "samples/s", "tokens/s", "rollout + scoring + update, s", "memory, MiB", "speed", "memory", "target"):
        made.add_column(name)
    for i, cells in enumerate(rows(entries)):
        made.add_row(*cells, end_section=i % 2 == 1)
    return made


def write(out: Path, entries: Sequence[dict[str, Any]]) -> None:
    """Write the entries so far: a benchmark that is ended keeps what it has."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(entries, indent=1) + "\n")


def show(out: Path, made: Any) -> None:
    """Print the table, and where the entries lie."""
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 150).print(made)
    print(f"written: {out}")
