"""A process that takes one measurement: `python -m tests.bench.ppo_worker prepare|ours|peer …`, started by tests.bench.ppo."""

from __future__ import annotations

import argparse
import json
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
        from tests.bench.cases import Case, prepare

        args.job.write_text(json.dumps(prepare(args.job.parent, Case(**args.case), args.model)))
        return
    import torch

    torch.set_num_threads(1)
    if args.side == "ours":
        from tests.bench.ours import measure
    else:
        from tests.bench.peer import measure
    args.out.write_text(json.dumps(measure(json.loads(args.job.read_text()), args.mode)))


if __name__ == "__main__":
    main()
