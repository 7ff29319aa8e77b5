"""Run under accelerate launch by test_soft_two: a soft prompt and what descends from it, in these processes, one after the other.

python -m tests.launch.soft_worker FOLDER LABEL
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from tests.launch.zero_worker import LORA, TRAIN
from tests.stage import ppo_runs
from tests.stage.runs import run, settings


def cases(folder: Path, label: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """Case -> its stage and config; each starts from the first."""

    def case(stage: str, **changes: Any) -> tuple[str, dict[str, Any]]:
        return stage, settings(folder, stage, TRAIN | changes.pop("train", {}), name=label, output=str(folder / f"{stage}-{label}"), **changes)

    start = f"sft/{label}"
    ppo = ppo_runs.settings(
        folder, f"ppo-{label}", {"iterations": 1, "micro_batch_size": 2}, name=label, init_from=start, scorers=[{"kind": "model", "checkpoint": f"reward/{label}"}], lora=LORA,
        split={"validation": 0.1, "test": 0.1}, evaluation=None,
    )  # fmt: skip
    return {
        "sft": case("sft", train={"learning_rate": 0.05}, tune={"method": "prefix_tuning" if "prefix" in label else "p_tuning", "virtual_tokens": 3}),
        "dpo": case("dpo", init_from=start), "reward": case("reward", init_from=start, lora=LORA), "ppo": ("ppo", ppo),
    }  # fmt: skip


def work(folder: Path, label: str) -> None:
    """Every case."""
    for stage, values in cases(folder, label).values():
        if stage == "ppo":
            ppo_runs.run_alone(values)
        else:
            run(stage, values)


if __name__ == "__main__":
    work(Path(sys.argv[1]), sys.argv[2])
