"""One measurement of our PPO: the stage's own `main`, in this process, with a clock around each iteration."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from tests.bench.peak import baseline, peak


def settings(job: dict[str, Any], mode: str) -> dict[str, Any]:
    """The stage's config. What is set here is what TRL 1.12 does; everything else is the stage's default."""
    case, folder = job["case"], Path(job["folder"])
    lora = {"lora": {"rank": case["lora_rank"], "alpha": 2 * case["lora_rank"]}} if mode == "lora" else {}
    return {
        "name": mode, "registry": str(folder / "registry"), "output": str(folder / "out" / mode), "init_from": "sft/one", "template": "raw",
        "prompts": str(folder / "prompts.jsonl"), "split": {"validation": 0, "test": 0}, "max_length": 512,
        "scorers": [{"kind": "model", "checkpoint": f"reward/{'adapter' if mode == 'lora' else 'whole'}"}],
        "sampling": {"max_new_tokens": case["completion_tokens"], "stop_at_eos": False, "generate_batch_size": case["generate_batch"]},
        "missing_eos": "none", "center_scores": False, "score_clip": None, **lora,
        "train": {
            "iterations": case["updates"] + 1, "rollout_batch_size": case["samples"], "num_ppo_epochs": case["epochs"], "num_minibatches": 1,
            "micro_batch_size": case["micro_batch"], "max_grad_norm": None, "precision": case["precision"], "save_every": 1000,
        },
    }  # fmt: skip


def measure(job: dict[str, Any], mode: str) -> dict[str, Any]:
    """Run the updates of a case; `mode` is full (four models) or lora (one backbone). Nothing is published."""
    import torch

    from configs.schema import PPOStage
    from stages import models
    from stages.ppo import train

    values = settings(job, mode)
    imports = baseline()
    clocks: list[dict[str, float]] = []
    inner, publish = train.run_iteration, train.publish

    def timed(*args: Any, **kwargs: Any) -> Any:
        wall, cpu = time.perf_counter(), time.process_time()
        result = inner(*args, **kwargs)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        clocks.append({"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu})
        return result

    train.run_iteration, train.publish = timed, lambda *_args, **_kwargs: None
    try:
        train.main(models.pinned(PPOStage.model_validate(values)))
    finally:
        train.run_iteration, train.publish = inner, publish
    rows = [json.loads(line) for line in (Path(values["output"]) / "metrics.jsonl").read_text().splitlines()]
    updates = [clock | {part: row[f"time/{part}"] for part in ("rollout", "scoring", "update")} for clock, row in zip(clocks, rows, strict=True)]
    return {"updates": updates, "imports": imports, "peak": peak(), **device_facts()}


def device_facts() -> dict[str, Any]:
    """The GPU's name and the most memory that tensors had on it, MiB; None without one."""
    import torch

    if not torch.cuda.is_available():
        return {"device": None, "device_peak": None}
    return {"device": torch.cuda.get_device_name(), "device_peak": torch.cuda.max_memory_allocated() / 2**20}
