"""A process that takes one measurement: `python -m tests.bench.ppo_worker prepare|ours|peer …`, started by tests.bench.ppo."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path


def main() -> None:
    """Write the job of a case, or read one and write what was measured."""
    parser = argparse.ArgumentParser()
    parser.add_argument("side", choices=["prepare", "ours", "peer"])
    parser.add_argument("--job", type=Path, required=True)
    parser.add_argument("--mode", choices=["full", "lora"], default="full")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--case", type=json.loads)
    parser.add_argument("--model")
    args = parser.parse_args()
    if args.side == "prepare":
        from dataclasses import replace

        from tests.bench.cases import CASES, Case, prepare, tiny

        case = Case(**args.case)
        toy = prepare(args.job.parent / "toy", replace(tiny(CASES["stories260K"]), precision=case.precision))
        args.job.write_text(json.dumps(prepare(args.job.parent, case, args.model) | {"toy": toy}))
        return
    import torch

    torch.set_num_threads(1)
    if args.side == "ours":
        from tests.bench.ours import measure
    else:
        from tests.bench.peer import measure
    job = json.loads(args.job.read_text())
    # Both sides import much only when they first need it. An update of a toy first, so that none of it counts as memory of the run.
    shutil.rmtree(Path(job["toy"]["folder"]) / "out", ignore_errors=True)
    measure(job["toy"], args.mode)
    args.out.write_text(json.dumps(measure(job, args.mode)))


if __name__ == "__main__":
    main()
