"""All four stages on one GPU with a random Llama of about 1B weights: tokens/s, share of the card's peak, peak memory beside the plan's; and plain TRL SFT.

python -m tests.bench.gpu [--case sft ...] [--tiny] [--out runs/bench/gpu.json]

Each case runs in a process of its own, full training in bf16. `--tiny` goes the same way with a tiny model, also on a CPU: its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.bench import gpu_cases as cases


def main(argv: list[str] | None = None) -> int:
    """Measure, print a table, write a list of JSON records. Exit code 2 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", choices=cases.CASES, action="append", help="which cases; all by default")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to see that the benchmark runs; needs no GPU")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/gpu.json"))
    parser.add_argument("--measure", nargs=2, metavar=("CASE", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.measure:
        print(json.dumps(measure(options.measure[0], Path(options.measure[1]))))
        return 0
    if not options.tiny and (lacking := no_gpu()):
        print(f"error: {lacking}; --tiny shows on a CPU that the benchmark runs", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        cases.prepare(folder, tiny=options.tiny)
        run = measure if options.tiny else in_a_process
        records = [run(case, folder) for case in options.case or cases.CASES]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(records, indent=1) + "\n")
    show(records)
    return 0


def no_gpu() -> str | None:
    """What is missing, or None."""
    import torch

    if torch.cuda.is_available():
        return None
    built = "this torch is built without CUDA" if torch.version.cuda is None and torch.version.hip is None else "look at nvidia-smi and CUDA_VISIBLE_DEVICES"
    return f"tests.bench.gpu measures on a GPU and torch finds none here ({built})"


def in_a_process(case: str, folder: Path) -> dict[str, Any]:
    """`measure` in a fresh process; a case that fails is a record too, with the end of its output."""
    done = subprocess.run([sys.executable, "-m", "tests.bench.gpu", "--measure", case, str(folder)], capture_output=True, text=True, check=False, timeout=1800)
    try:
        return dict(json.loads(done.stdout.splitlines()[-1]))
    except (IndexError, ValueError):
        return {"case": case, "failed": (done.stderr or done.stdout)[-2000:], "exit_code": done.returncode}


def measure(case: str, folder: Path) -> dict[str, Any]:
    """One case in this process: seconds of the middle step after the warm-up, tokens/s, share of the peak, and peak bytes beside the plan's."""
    import torch

    from tests.bench.results import PEAK_FLOPS

    planned = cases.planned(folder, case)
    seconds, peak_bytes = cases.run_peer(folder) if case == cases.PEER else cases.run_stage(folder, case)
    tokens, flops = cases.work_of(planned, case)
    step = statistics.median(seconds[cases.WARM_UP :])
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    peak = next((value for name, value in PEAK_FLOPS.items() if name in device), None)
    predicted = None if case == cases.PEER else planned.estimate.peak.total
    return {
        "case": case, "device": device, "parameters": cases.parameters(planned), "steps": len(seconds), "step_seconds": step, "tokens_per_step": tokens,
        "tokens_per_second": tokens / step, "share_of_peak_flops": flops / step / peak if peak else None, "peak_bytes": peak_bytes, "planned_bytes": predicted,
        "plan_error": (predicted - peak_bytes) / peak_bytes if predicted is not None else None,
    }  # fmt: skip


def show(records: list[dict[str, Any]]) -> None:
    """A table of all records."""
    print(f"{'case':10}{'tokens/s':>12}{'s/step':>10}{'of peak':>9}{'peak, GiB':>11}{'planned':>9}{'error':>8}")
    for found in records:
        if "failed" in found:
            print(f"{found['case']:10}FAILED: {found['failed'].strip().splitlines()[-1] if found['failed'].strip() else found['exit_code']}")
            continue
        share = f"{found['share_of_peak_flops']:.1%}" if found["share_of_peak_flops"] is not None else "?"
        plan = (f"{found['planned_bytes'] / 2**30:.2f}", f"{found['plan_error']:+.1%}") if found["planned_bytes"] is not None else ("", "")
        print(f"{found['case']:10}{found['tokens_per_second']:>12,.0f}{found['step_seconds']:>10.3f}{share:>9}{found['peak_bytes'] / 2**30:>11.2f}{plan[0]:>9}{plan[1]:>8}")


if __name__ == "__main__":
    sys.exit(main())
