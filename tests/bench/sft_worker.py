"""A process that takes one measurement: `python -m tests.bench.sft_worker prepare|ours|peer …`, started by tests.bench.sft."""

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
    parser.add_argument("--case", type=json.loads)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    from tests.bench import sft_cases

    if args.side == "prepare":
        case = sft_cases.SFTCase(**(args.case | {"tokens": tuple(args.case["tokens"])}))
        toy = sft_cases.prepare(args.job.parent / "toy", sft_cases.tiny(case))
        args.job.write_text(json.dumps(sft_cases.prepare(args.job.parent, case) | {"toy": toy}))
        return
    import torch

    from tests.bench import sft_sides

    torch.set_num_threads(1)
    measure = sft_sides.ours if args.side == "ours" else sft_sides.peer
    job = json.loads(args.job.read_text())
    # Both sides import much only when they first need it. Some steps of a toy first, so that none of it counts as memory of the run.
    measure(job["toy"], args.seed)
    args.out.write_text(json.dumps(measure(job, args.seed)))
    for folder in (Path(job["folder"]), Path(job["toy"]["folder"])):
        for name in ("out", "out-peer", "registry"):
            shutil.rmtree(folder / name, ignore_errors=True)


if __name__ == "__main__":
    main()
