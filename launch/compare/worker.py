"""Trains one technique for a few steps and measures it: python -m launch.compare.worker JOB.json RESULT.json

The stage runs as it is, down to what it publishes, in a registry and folder that are thrown away afterwards.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from configs.errors import UserError
from launch.compare.memory import Meter


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 2 with one line for what the user can mend."""
    job, result = (Path(name) for name in (sys.argv[1:] if argv is None else argv))
    try:
        result.write_text(json.dumps(measured(json.loads(job.read_text(encoding="utf-8")))))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def measured(values: dict[str, Any]) -> dict[str, Any]:
    """Run SFT with the config `values`: parameters, bytes of memory, steps a second, loss, bytes of what is published.

    Raises:
        UserError: this technique can't be trained here.
    """
    from configs.schema import SFTStage
    from stages import sft
    from stages.registry import Registry
    from stages.training import resume

    cfg = SFTStage.model_validate(values)
    found: dict[str, Any] = {}
    train = resume.train

    def timed(trainer: Any, *rest: Any) -> None:
        trainer.add_callback(clock_of(found, meter))
        train(trainer, *rest)

    with Meter() as meter, mock.patch.object(resume, "train", timed):
        sft.main(cfg)
    published = Registry(cfg.registry).resolve(f"sft/{cfg.name}")
    loss = (published.info("metrics") or {}).get("loss")
    return {
        **found, "loss": _last_loss(cfg) if loss is None else loss, "validated": loss is not None,
        "bytes": sum(file.stat().st_size for file in published.model_dir.glob("*.safetensors")),
    }  # fmt: skip


def clock_of(found: dict[str, Any], meter: Meter) -> Any:
    """A callback that writes what it measures to `found`: on a CPU the memory of the odd steps and the time of the even ones, on a GPU both of all, but for the
    time of the first, which warms up. Evaluation comes after the last step and counts as neither."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        began = 0.0

        def __init__(self) -> None:
            self.seconds: list[float] = []

        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            """Count what is trained, before a schedule freezes some of it for now."""
            sizes = {id(p): (p.numel() * (2 if str(p.dtype) == "torch.uint8" else 1), p.requires_grad) for p in model.parameters()}
            found.update(trainable=sum(size for size, trained in sizes.values() if trained), parameters=sum(size for size, _ in sizes.values()))
            meter.begin()  # loading takes the same of all, on a CPU the weights twice

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            now = _now(meter.on_gpu)
            if state.global_step > 1 and not meter.follows:
                self.seconds.append(now - self.began)
            found["memory"] = meter.peak
            if state.global_step == state.max_steps:
                found["steps_per_second"] = len(self.seconds) / sum(self.seconds)
                control.should_save = False  # nobody resumes it, and a save of full training takes three times the model's room
            if state.global_step % 2 or state.global_step == state.max_steps:
                meter.rest()
            else:
                meter.go_on()
            self.began = _now(meter.on_gpu)

    return Clock()


def _now(on_gpu: bool) -> float:
    """Seconds, once what a GPU has been asked for is done."""
    if on_gpu:
        import torch

        torch.cuda.synchronize()
    return time.monotonic()


def _last_loss(cfg: Any) -> float | None:
    """The last training loss, where there are no validation rows."""
    rows = [json.loads(line) for line in (cfg.output / "metrics.jsonl").read_text().splitlines()]
    return next((row["sft/loss"] for row in reversed(rows) if "sft/loss" in row), None)


if __name__ == "__main__":
    sys.exit(main())
