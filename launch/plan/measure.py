"""Two micro-steps of the real stage with its longest rows, in processes of their own: peak memory and seconds, nothing published.

`python -m launch.plan.measure --stage STAGE --config FILE --result FOLDER` is what each process runs.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

MICRO_STEPS = 2
PATCHED = {"encode_demonstrations": "input_ids", "encode_pairs": "chosen_ids", "encode_prompts": "prompt_ids"}


def measured_config(cfg: Any, stage: str, processes: int, folder: Path) -> Any:
    """The stage's config for one optimizer step (PPO: one iteration) of two micro-batches."""
    rows = MICRO_STEPS * cfg.train.micro_batch_size * processes
    if stage == "ppo":
        train = {"iterations": 1, "rollout_batch_size": rows, "num_ppo_epochs": 1, "num_minibatches": 1, "warmup_iterations": 0, "value_warmup_iterations": 0}
        own: dict[str, Any] = {"evaluation": None, "sampling": cfg.sampling.model_copy(update={"stop_at_eos": False})}
    else:
        train, own = {"max_steps": 2, "batch_size": rows, "early_stopping_patience": None, "epochs": 2.0}, {}
        if stage == "sft":
            own = {"evaluation": type(cfg.evaluation)(test=False)}
    return cfg.model_copy(update=own | {"output": folder / "out", "train": cfg.train.model_copy(update=train)})


def run_measured(cfg: Any, stage: str, machine: Any, processes: int) -> dict[str, Any]:
    """Start the stage and return {"peak_bytes", "seconds"}: of the process with the highest peak, seconds of one optimizer step.

    Raises:
        UserError: it failed; with the end of its log.
    """
    import tempfile

    from configs.errors import UserError
    from configs.load import save
    from launch.command import stage_command
    from launch.process import run_child

    with tempfile.TemporaryDirectory(prefix="align-plan-") as place:
        folder = Path(place)
        save(measured_config(cfg, stage, processes, folder), folder / "config.yaml")
        command = stage_command("launch.plan.measure", folder / "config.yaml", machine, processes)
        argv = [*command.argv, "--stage", stage, "--result", str(folder)]
        outcome = run_child(argv, command.environment(), folder / "log", prefix=f"measure {stage}", to_stderr=True)
        found = [json.loads(file.read_text()) for file in folder.glob("measured-*.json")]
        if not found:
            tail = "\n".join((folder / "log").read_text(errors="replace").splitlines()[-5:]) if (folder / "log").is_file() else ""
            raise UserError(f"--measure: stage {stage} ended with code {outcome.code} before its step was done: {tail}")
    return max(found, key=lambda each: each["peak_bytes"])


def main() -> None:
    """Run the stage in this process under the tracker, its rows replaced by the longest of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("--stage", "--config", "--result"):
        parser.add_argument(name, required=True)
    options = parser.parse_args()
    from configs.load import load
    from stages import models
    from stages.devices import hide_gpus_if_asked

    hide_gpus_if_asked()
    cfg = models.pinned(load(options.config, options.stage))
    found = measure(cfg, options.stage)
    Path(options.result, f"measured-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(found))
    from stages.zero.leave import leave

    leave()


def measure(cfg: Any, stage: str) -> dict[str, Any]:
    """Peak bytes of what torch allocates (of a GPU: what its allocator says) and seconds of the last optimizer step."""
    import torch

    from launch.plan.allocations import Allocations

    run = importlib.import_module("stages.ppo.train" if stage == "ppo" else f"stages.{stage}").main
    tracker = Allocations()
    times: list[float] = []
    with ExitStack() as stack:
        stack.enter_context(_longest_rows())
        stack.enter_context(step_times(stage, times))
        for module in ("stages.training.publish", "stages.ppo.train"):
            stack.enter_context(mock.patch(f"{module}.publish_checkpoint", return_value=""))
        if not torch.cuda.is_available():
            stack.enter_context(tracker)
        run(cfg)
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else tracker.highest.total
    return {"peak_bytes": peak, "seconds": times[-1] if times else None}


@contextmanager
def _longest_rows() -> Iterator[None]:
    """Within the block every encoded row is the longest one."""
    import stages.data

    def longest(encode: Callable[..., Any], key: str) -> Callable[..., Any]:
        def encoded(*args: Any, **kwargs: Any) -> Any:
            rows, dropped = encode(*args, **kwargs)
            top = max(rows, key=lambda row: len(row.get("prompt_ids", [])) + len(row[key])) if rows else None
            return [top] * len(rows), dropped

        return encoded

    with ExitStack() as stack:
        for name, key in PATCHED.items():
            stack.enter_context(mock.patch.object(stages.data, name, longest(getattr(stages.data, name), key)))
        yield


@contextmanager
def step_times(stage: str, times: list[float]) -> Iterator[None]:
    """Within the block the seconds of each micro-step (PPO: of each iteration) go into `times`."""
    import torch

    owner: Any = importlib.import_module("stages.ppo.train") if stage == "ppo" else importlib.import_module("transformers").Trainer
    name = "run_iteration" if stage == "ppo" else "training_step"
    original = getattr(owner, name)

    def timed(*args: Any, **kwargs: Any) -> Any:
        began = time.monotonic()
        out = original(*args, **kwargs)
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # else the clock stops when the work has been asked for
        times.append(time.monotonic() - began)
        return out

    with mock.patch.object(owner, name, timed):
        yield


if __name__ == "__main__":
    main()
