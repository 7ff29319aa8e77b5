"""The scaling model against this machine: SFT and PPO of a small Llama on one process and on two (DDP over gloo), taking turns.

`python -m tests.bench.scaling [--rounds 3] [--out FILE]`. Each process has one thread. Two constants are set on runs of one process (arithmetic on
SFT's step, host time per layer on PPO's rollout), the link on an all-reduce of 16 MiB; what is predicted is everything else. Times are the
shortest of all rounds' steps: other work on the machine only ever adds.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from launch.doctor.collectives import collective
from launch.scale import Device, Efficiency, Hardware, ModelShape, Network, PlanFacts
from launch.scale.passes import Cost
from launch.scale.step import step_costs
from tests.stage.runs import ENVIRONMENT, ROOT, command, write_rows
from tests.tiny import tiny_model

HIDDEN, LAYERS, TOKENS, PROMPT, NEW = 256, 4, 128, 32, 64
SFT_ROWS, PPO_ROWS, MICRO, STEPS, ITERATIONS = 16, 32, 8, 12, 4


def main(argv: list[str] | None = None) -> int:
    """Measure by turns, set the constants, print predicted and measured."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.scaling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="runs of each stage on each number of processes (default 3)")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/scaling.json"), help="default runs/bench/scaling.json")
    args = parser.parse_args(argv)
    times: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        for number in range(args.rounds):
            for processes in (1, 2):
                for name, seconds in [*sft(Path(folder), processes, number).items(), *ppo(Path(folder), processes, number).items()]:
                    times.setdefault(name, []).extend(seconds)
        link = collective("gloo", 2).facts["all-reduce of 16 MiB [MB/s]"] * 1e6
        parameters = sum(t.numel() for t in torch.load(Path(folder) / "weights.pt").values())
    measured = {name: min(values) for name, values in times.items()}
    entries = predict(measured, link, parameters)
    for entry in entries:
        print("{case:<22} predicted {predicted:8.3f} s  measured {measured:8.3f} s  error {error:+6.0%}  {role}".format(**entry))
    for stage in ("sft", "ppo"):
        speedups = [whole(values, stage, 1) / whole(values, stage, 2) for values in ({e["case"]: e["predicted"] for e in entries}, measured)]
        print(f"{stage}: two processes are {speedups[0]:.2f} times as fast (predicted), {speedups[1]:.2f} times (measured)")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"entries": entries, "link": link, "times": times}, indent=1) + "\n")
    return 0


def whole(values: dict[str, float], stage: str, processes: int) -> float:
    """Seconds of a step: the sum of the stage's parts."""
    return sum(value for name, value in values.items() if name.startswith(f"{stage} {processes}"))


def prepare(folder: Path) -> None:
    """A random base and rows whose lengths are exact: every byte is a token."""
    tiny_model(folder / "base", hidden=HIDDEN, layers=LAYERS)
    from safetensors.torch import load_file

    torch.save(load_file(folder / "base" / "model.safetensors"), folder / "weights.pt")
    texts = [f"{index:06d}".ljust(PROMPT - 2, "abcdefgh"[index % 8]) for index in range(SFT_ROWS * STEPS)]
    write_rows(folder / "sft.jsonl", [{"prompt": text, "completion": "y" * (TOKENS - len(text) - 1)} for text in texts])
    write_rows(folder / "prompts.jsonl", [{"prompt": text} for text in texts])


def sft(folder: Path, processes: int, number: int) -> dict[str, list[float]]:
    """Seconds of the steps after the first two, from the rows per second that the stage prints."""
    train = {"max_steps": STEPS, "batch_size": SFT_ROWS, "micro_batch_size": MICRO, "log_every": 1, "precision": "fp32"}
    printed = start(folder, "sft", {"data": str(folder / "sft.jsonl"), "max_length": 2 * TOKENS, "train": train}, processes, number)
    rates = [float(rate) for rate in re.findall(r"([\d.]+) rows/s", printed)]
    return {f"sft {processes} training": [SFT_ROWS / rate for rate in rates[2:]]}


def ppo(folder: Path, processes: int, number: int) -> dict[str, list[float]]:
    """Seconds of the parts of the iterations after the first, from the stage's metrics."""
    train = {"iterations": ITERATIONS, "rollout_batch_size": PPO_ROWS, "num_ppo_epochs": 2, "micro_batch_size": MICRO, "precision": "fp32"}
    start(folder, "ppo", {
        "prompts": str(folder / "prompts.jsonl"), "max_length": 2 * TOKENS, "scorers": [{"kind": "length", "target": 5}], "evaluation": None, "missing_eos": "none",
        "sampling": {"max_new_tokens": NEW, "stop_at_eos": False, "generate_batch_size": PPO_ROWS}, "train": train,
    }, processes, number)  # fmt: skip
    rows = [json.loads(line) for line in (folder / f"ppo-{processes}-{number}" / "metrics.jsonl").read_text().splitlines()]
    return {f"ppo {processes} {part}": [row[f"time/{part}"] for row in rows[1:] if f"time/{part}" in row] for part in ("rollout", "scoring", "update")}


def start(folder: Path, stage: str, values: dict[str, Any], processes: int, number: int) -> str:
    """Run a stage to its end and return what it printed."""
    name = f"{stage}-{processes}-{number}"
    common = {"name": name, "registry": str(folder / "registry"), "output": str(folder / name), "init_from": str(folder / "base"), "template": "raw", "split": {"validation": 0, "test": 0}}
    started = time.monotonic()
    done = subprocess.run(command(stage, common | values, folder / f"{name}.json", processes), env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    print(f"{name}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    return done.stdout


def predict(measured: dict[str, float], link: float, parameters: int) -> list[dict[str, Any]]:
    """Every measured part with its prediction, and whether a constant was set on it."""
    shape = ModelShape(parameters, parameters, LAYERS, HIDDEN, HIDDEN, 259)
    plans = {
        "sft": PlanFacts("sft", shape, SFT_ROWS, 1, TOKENS, MICRO, weight_bytes=4, gradient_bytes=4),
        "ppo": PlanFacts("ppo", shape, PPO_ROWS, 1, PROMPT, MICRO, new_tokens=NEW, weight_bytes=4, gradient_bytes=4, reference=shape.frozen(), value=replace(shape, vocabulary=0), epochs=2, generate_batch=PPO_ROWS),
    }  # fmt: skip
    # Peaks that are all one: `gemm` is then FLOP/s. Memory is left out: tensors of this size stay in the cache.
    bare = Hardware(Device("CPU", 1.0, 1e30, 1e9, asynchronous=False), Network(2, link, 1e-4, link, 1e-4), Efficiency(1.0, 1.0, 1.0, 0.0, 0.0, 0.0))

    def costs(gemm: float, launch: float) -> Callable[[str, int], dict[str, Cost]]:
        return lambda stage, processes: step_costs(plans[stage], processes, bare.with_efficiency(gemm=gemm, launch=launch))

    gemm, launch = solve(costs, measured)
    found = {f"{stage} {processes} {part}": cost.seconds for stage in plans for processes in (1, 2) for part, cost in costs(gemm, launch)(stage, processes).items()}
    set_on = ("sft 1 training", "ppo 1 rollout")
    return [
        {"case": case, "predicted": found[case], "measured": seconds, "error": found[case] / seconds - 1, "role": "set on this" if case in set_on else "held out"}
        for case, seconds in measured.items()
    ]


def solve(costs: Callable[[float, float], Callable[[str, int], dict[str, Cost]]], measured: dict[str, float]) -> tuple[float, float]:
    """(FLOP/s, host seconds per layer) that make one process's SFT step and rollout come out: both times are linear in 1 / FLOP/s and in the host's."""
    rows = []
    for stage, part in (("sft", "training"), ("ppo", "rollout")):
        rows.append((costs(1.0, 0.0)(stage, 1)[part].seconds, costs(1e30, 1.0)(stage, 1)[part].seconds, measured[f"{stage} 1 {part}"]))
    solved = torch.linalg.solve(torch.tensor([row[:2] for row in rows], dtype=torch.float64), torch.tensor([row[2] for row in rows], dtype=torch.float64))
    assert bool((solved > 0).all()), f"these times fit no FLOP/s and host time: {rows}"
    return 1 / float(solved[0]), float(solved[1])


if __name__ == "__main__":
    raise SystemExit(main())
