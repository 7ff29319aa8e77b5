"""A few steps of the real stage, in processes of their own: peak memory with its longest rows and seconds with typical ones, nothing published.

`python -m launch.plan.measure --stage STAGE --config FILE --result FOLDER` is what each process runs.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any


def run_measured(cfg: Any, stage: str, machine: Any, processes: int) -> dict[str, Any]:
    """Start the stage and return what `measure` found in the process with the highest peak.

    Raises:
        UserError: it failed; with the end of its log.
    """
    import tempfile

    from configs.errors import UserError
    from configs.load import save
    from launch.command import stage_command
    from launch.plan.excerpt import excerpt
    from launch.process import run_child

    with tempfile.TemporaryDirectory(prefix="align-plan-") as place:
        folder = Path(place)
        save(excerpt(cfg, stage, processes, folder), folder / "config.yaml")
        batch = 0 if stage == "ppo" else cfg.train.batch_size
        command = stage_command("launch.plan.measure", folder / "config.yaml", machine, processes)
        argv = [*command.argv, "--stage", stage, "--batch", str(batch), "--result", str(folder)]
        outcome = run_child(argv, command.environment(), folder / "log", prefix=f"measure {stage}", to_stderr=True)
        found = [json.loads(file.read_text()) for file in folder.glob("measured-*.json")]
        if not found:
            tail = "\n".join((folder / "log").read_text(errors="replace").splitlines()[-5:]) if (folder / "log").is_file() else ""
            raise UserError(f"--measure: stage {stage} ended with code {outcome.code} before its steps were done: {tail}")
    return max(found, key=lambda each: each["peak_bytes"])


def main() -> None:
    """Run the steps in this process under the tracker."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("--stage", "--config", "--result"):
        parser.add_argument(name, required=True)
    parser.add_argument("--batch", type=int, default=0, help="rows of an optimizer step of the whole stage")
    options = parser.parse_args()
    from configs.load import load
    from stages import models
    from stages.devices import hide_gpus_if_asked

    hide_gpus_if_asked()
    cfg = models.pinned(load(options.config, options.stage))
    found = measure(cfg, options.stage, options.batch)
    Path(options.result, f"measured-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(found))
    from stages.zero.leave import leave

    leave()


def measure(cfg: Any, stage: str, batch: int = 0) -> dict[str, Any]:
    """{"peak_bytes", "steps"} of an excerpt (launch/plan/excerpt.py) of a stage: the most bytes of what torch allocates (of a GPU: what its allocator
    says), and the seconds of each step's parts (launch/plan/clocks.py). `batch`: rows of an optimizer step of the whole stage; PPO needs none."""
    import torch

    from launch.plan.allocations import Allocations
    from launch.plan.clocks import iterations, optimizer_steps
    from launch.plan.excerpt import LONGEST, MeasuredError, excerpted

    run = importlib.import_module("stages.ppo.train" if stage == "ppo" else f"stages.{stage}").main
    tracker, steps, tracked = Allocations(), list[dict[str, float]](), ExitStack()

    def begin() -> None:
        if len(steps) == LONGEST:
            tracked.close()  # it would slow down the steps that tell the time

    with tracked, suppress(MeasuredError), (iterations if stage == "ppo" else optimizer_steps)(steps, begin), excerpted(stage, cfg, batch):
        if not torch.cuda.is_available():
            tracked.enter_context(tracker)
        run(cfg)
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else tracker.highest.total
    return {"peak_bytes": peak, "steps": steps}


if __name__ == "__main__":
    main()
