"""Runs stages under the tracker and writes each one's peak: one process, or one of several under accelerate launch.

Measured is what torch allocates: every storage from when an operation first returns or reads it until it is freed, backward passes included.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any


def main() -> None:
    """python -m tests.bench.plan_worker FOLDER LAYOUT CASE..."""
    folder, layout, cases = Path(sys.argv[1]), sys.argv[2], [case.split(":") for case in sys.argv[3:]]
    rank = int(os.environ.get("RANK", "0"))
    out = folder / f"measured-{layout}-{rank}.jsonl"
    for stage, kind in cases:
        try:
            found: dict[str, Any] = measure(folder, stage, kind, layout)
        except Exception as error:
            traceback.print_exc()
            found = {"failed": f"{type(error).__name__}: {error}"}
        with out.open("a") as stream:
            stream.write(json.dumps({"stage": stage, "kind": kind, "layout": layout, "rank": rank} | found) + "\n")
        if "failed" in found and layout != "one":
            break  # the other ranks may wait for this one


def measure(folder: Path, stage: str, kind: str, layout: str) -> dict[str, Any]:
    """Peak of what torch allocates, and of resident memory above what it was before, bytes."""
    from configs import schema
    from launch.plan.allocations import Allocations
    from stages import models
    from stages.training import entry
    from tests.bench.peak import baseline, peak
    from tests.bench.plan_cases import settings

    run = importlib.import_module("stages.ppo.train" if stage == "ppo" else f"stages.{stage}").main
    cfg = getattr(schema, {"sft": "SFTStage", "reward": "RewardStage", "dpo": "DPOStage", "ppo": "PPOStage"}[stage]).model_validate(settings(folder, stage, kind, layout))
    importlib.import_module("trl"), importlib.import_module("peft"), entry
    gc.collect()
    before = baseline()
    tracker = Allocations()
    with tracker:
        run(models.pinned(cfg))
    highest = tracker.highest
    del tracker
    gc.collect()
    return {"measured": highest.total, "operation": highest.operation, "resident": int((peak() - before) * 2**20)}


if __name__ == "__main__":
    main()
    from stages.zero.leave import leave

    leave()
