"""SFT against TRL's SFTTrainer: `make bench-sft`, or `python -m tests.bench.sft`.

Both sides train the same random model on the same rows with the same batch, steps, precision and one thread; each measurement is a process of
its own, and the sides take turns, so that a machine that is busier for a while is so for both. Round k has seed k on both sides. Speed is
tokens that are no padding per second, medians over the steps after the first three; memory is the peak above what is resident once all is
imported (on a GPU: what tensors held at most); the loss is that of the trained weights on rows held out, computed by plain transformers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tests.bench.peak import environment
from tests.bench.results import show, write
from tests.bench.sft_cases import SFT_CASES, SFTCase, tiny

ROOT = Path(__file__).parents[2]
UNTIMED = 3  # steps at the start of a process
SIDES = ("ours", "peer")


def main(argv: list[str] | None = None) -> int:
    """Measure, print the table, write the JSON."""
    args = parser().parse_args(argv)
    entries = [e for e in (json.loads(args.out.read_text()) if args.add and args.out.is_file() else []) if e["case"] not in (args.cases or ())]
    for case in chosen(args):
        entries.append(entry(case, measure(case, 1 if args.quick else args.rounds)))
        write(args.out, entries)
    show(args.out, table(entries))
    return 0


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    made = argparse.ArgumentParser(prog="python -m tests.bench.sft", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--cases", nargs="+", choices=sorted(SFT_CASES), help="default: all that this machine can run")
    made.add_argument("--rounds", type=int, default=3, help="processes per side, each with a seed of its own (default 3)")
    made.add_argument("--steps", type=int, help="optimizer steps; default: the case's own")
    made.add_argument("--quick", action="store_true", help="one round of next to no work: shows that it runs, measures nothing")
    made.add_argument("--add", action="store_true", help="keep the other cases of the JSON file")
    made.add_argument("--out", type=Path, default=Path("runs/bench/sft.json"), help="default runs/bench/sft.json")
    return made


def chosen(args: argparse.Namespace) -> list[SFTCase]:
    """The cases to measure, with what the command line changes."""
    import torch

    cases = [SFT_CASES[name] for name in args.cases or SFT_CASES]
    if not args.cases:
        cases = [case for case in cases if not case.gpu or torch.cuda.is_available()]
    if args.quick:
        return [tiny(case) for case in cases]
    return [replace(case, steps=args.steps or case.steps) for case in cases]


def measure(case: SFTCase, rounds: int) -> dict[str, list[dict[str, Any]]]:
    """All rounds of a case, by side."""
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory(prefix="bench-sft-") as place:
        job, result = Path(place) / "job.json", Path(place) / "result.json"
        worker("prepare", "--job", str(job), "--case", json.dumps(asdict(case)), gpu=case.gpu)
        for number in range(rounds):
            for side in SIDES if number % 2 == 0 else SIDES[::-1]:
                worker(side, "--job", str(job), "--seed", str(number), "--out", str(result), gpu=case.gpu)
                found[side].append(json.loads(result.read_text()))
                one = summary([found[side][-1]])
                print(
                    f"{case.name} seed {number}: {side} {one['tokens_per_second']:.0f} tokens/s, {one['memory_mib']:.0f} MiB, held-out loss {one['eval_loss']:.4f}",
                    flush=True,
                )
    return found


def worker(*arguments: str, gpu: bool) -> None:
    """Run one process to its end; what it says is shown only where it fails.

    Raises:
        SystemExit: it failed.
    """
    surroundings = environment() | {"PYTHONPATH": str(ROOT)}
    if gpu:
        surroundings.pop("CUDA_VISIBLE_DEVICES")
    done = subprocess.run([sys.executable, "-m", "tests.bench.sft_worker", *arguments], env=surroundings, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{arguments[0]} failed with status {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the timed steps of all processes; memory and loss over the processes."""
    timed = [(s, c, t) for run in runs for s, c, t in list(zip(run["seconds"], run["cpu_seconds"], run["tokens"], strict=True))[UNTIMED:]]
    on_device = [run["device_peak"] for run in runs if run["device_peak"] is not None]
    losses = [run["eval_loss"] for run in runs]
    return {
        "tokens_per_second": statistics.median(t / s for s, _, t in timed), "tokens_per_cpu_second": statistics.median(t / c for _, c, t in timed),
        "seconds_per_step": statistics.median(s for s, _, _ in timed), "tokens_per_step": statistics.mean(t for _, _, t in timed),
        "memory_mib": statistics.median(on_device or [run["peak"] - run["imports"] for run in runs]), "eval_loss": statistics.mean(losses), "eval_losses": losses,
    }  # fmt: skip


def entry(case: SFTCase, found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """One element of the JSON list. Ratios are ours over the peer's: tokens per second, and memory."""
    mine, theirs = (summary(found[side]) for side in SIDES)
    return {
        "case": case.name, "speed_ratio": mine["tokens_per_second"] / theirs["tokens_per_second"],
        "cpu_speed_ratio": mine["tokens_per_cpu_second"] / theirs["tokens_per_cpu_second"], "memory_ratio": mine["memory_mib"] / theirs["memory_mib"],
        "eval_loss": mine["eval_loss"], "peer_eval_loss": theirs["eval_loss"], "ours": mine, "peer": theirs, "settings": asdict(case),
    }  # fmt: skip


def table(entries: Sequence[dict[str, Any]]) -> Any:
    """A rich table of all entries."""
    from rich.table import Table

    made = Table(title="SFT, ours beside TRL's SFTTrainer (held-out loss: mean over seeds ± their standard deviation)")
    for name in ("case", "tokens/s", "TRL", "speed", "(CPU time)", "MiB", "TRL", "memory", "loss", "TRL"):
        made.add_column(name, justify="left" if name == "case" else "right")
    for e in entries:
        mine, theirs = e["ours"], e["peer"]
        made.add_row(
            e["case"], f"{mine['tokens_per_second']:.0f}", f"{theirs['tokens_per_second']:.0f}", f"{e['speed_ratio']:.2f}x", f"{e['cpu_speed_ratio']:.2f}x",
            f"{mine['memory_mib']:.0f}", f"{theirs['memory_mib']:.0f}", f"{e['memory_ratio']:.2f}x", _spread(mine), _spread(theirs),
        )  # fmt: skip
    return made


def _spread(side: dict[str, Any]) -> str:
    losses = side["eval_losses"]
    return f"{side['eval_loss']:.4f}" + (f" ± {statistics.stdev(losses):.4f}" if len(losses) > 1 else "")


if __name__ == "__main__":
    sys.exit(main())
