"""Run under accelerate launch by test_zero: every case of the equality matrix in these processes, one after the other.

python -m tests.launch.zero_worker FOLDER LABEL [CASE ...]
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from tests.stage.runs import run, settings

LORA = {"rank": 4, "alpha": 8.0}
STAGES = ("sft", "reward", "dpo")
# Clipping at every step, four micro-batches per step on one process and two on each of two.
TRAIN = {"max_steps": 6, "batch_size": 8, "micro_batch_size": 2, "learning_rate": 1e-3, "max_grad_norm": 0.5, "eval_every": 3}


def cases(folder: Path, label: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """Case -> its stage and config."""
    found = {}
    for stage in STAGES:
        for kind, changes in {"full": {}, "lora": {"lora": LORA}}.items():
            case = f"{stage}-{kind}"
            found[case] = (stage, settings(folder, stage, TRAIN, name=f"{kind}-{label}", output=str(folder / f"out-{case}-{label}"), **changes))
    return found


def facts_of(trainer: Any) -> dict[str, Any]:
    """What the engine was told, and how much of the model this process holds."""
    parameters = list(trainer.model.parameters())
    held, whole = sum(getattr(p, "ds_tensor", p).numel() for p in parameters), sum(getattr(p, "ds_numel", p.numel()) for p in parameters)
    engine = trainer.model_wrapped
    if not trainer.is_deepspeed_enabled:
        return {"held": held, "whole": whole}
    return {
        "held": held, "whole": whole, "clipping": engine.gradient_clipping(), "accumulation": engine.gradient_accumulation_steps(),
        "micro_batch": engine.train_micro_batch_size_per_gpu(), "stage": engine.zero_optimization_stage(),
    }  # fmt: skip


def work(folder: Path, label: str, chosen: list[str]) -> None:
    """Every case; rank 0 writes what it saw of the engines."""
    from stages.training import resume

    seen: dict[str, Any] = {}
    train = resume.train

    def observed(trainer: Any, *arguments: Any) -> None:
        train(trainer, *arguments)
        seen[case] = facts_of(trainer)

    resume.train = observed
    for case, (stage, values) in cases(folder, label).items():
        if not chosen or case in chosen:
            run(stage, values)
    if os.environ.get("RANK", "0") == "0":
        (folder / f"facts-{label}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    work(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
