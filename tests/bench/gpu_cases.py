"""What the benchmark on a GPU runs: a random Llama, its rows, the stages' configs, and the same SFT through plain TRL."""

from __future__ import annotations

import importlib
import json
import random
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

PEER = "trl-sft"
CASES = ("sft", PEER, "reward", "dpo", "ppo")
WARM_UP = 2  # micro-steps (PPO: iterations) that are not counted
# Operations per parameter and token: 2 forward, 4 backward. DPO's reference passes forward too.
PER_TOKEN = {"sft": 6, PEER: 6, "reward": 6, "dpo": 8}
SIZES: dict[bool, dict[str, Any]] = {
    False: {"case": "llama1b", "words": 511, "rows": 64, "micro_batch": 4, "steps": 8, "iterations": 4},
    True: {"case": "stories260K", "words": 12, "rows": 8, "micro_batch": 2, "steps": 4, "iterations": 3},
}


def prepare(folder: Path, *, tiny: bool) -> None:
    """The models (sft/one, reward/whole), demonstrations, pairs and prompts, and `size.json` with what every case reads."""
    from tests.bench import cases

    size = SIZES[tiny]
    case = cases.tiny(cases.CASES[size["case"]]) if tiny else cases.CASES[size["case"]]
    job = cases.prepare(folder, case)
    numbers, words = random.Random(0), case.model["vocab_size"] - 4

    def text() -> str:
        return " ".join(f"w{numbers.randrange(4, words)}" for _ in range(size["words"]))

    rows = [{"prompt": text(), "completion": text()} for _ in range(size["rows"])]
    pairs = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": text()} for row in rows]
    for name, content in (("sft", rows), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    (folder / "size.json").write_text(json.dumps(size | {"job": job, "tiny": tiny}))


def config(folder: Path, stage: str) -> Any:
    """The stage's config: full training, batches of two micro-batches."""
    from configs import schema
    from tests.bench import ours

    size = json.loads((folder / "size.json").read_text())
    if stage == "ppo":
        values = ours.settings(size["job"], "full")
        values["train"] |= {"iterations": size["iterations"]}
        return schema.PPOStage.model_validate(values)
    micro = size["micro_batch"] if stage == "sft" else max(1, size["micro_batch"] // 2)  # a pair is two rows
    train = {"max_steps": size["steps"] // 2, "epochs": 2, "batch_size": 2 * micro, "micro_batch_size": micro, "precision": "fp32" if size["tiny"] else "bf16"}
    values = {
        "name": stage, "registry": str(folder / "registry"), "output": str(folder / f"out-{stage}"), "init_from": "sft/one", "template": "raw",
        "data": str(folder / ("sft.jsonl" if stage == "sft" else "pairs.jsonl")), "split": {"validation": 0, "test": 0},
        "max_length": 2 * size["words"] + 2, "train": train,
    }  # fmt: skip
    return {"sft": schema.SFTStage, "reward": schema.RewardStage, "dpo": schema.DPOStage}[stage].model_validate(values)


def planned(folder: Path, case: str) -> Any:
    """What `align plan` says of a case on this device; of the peer, of our SFT."""
    from launch.plan.make import plan
    from launch.plan_cli import devices

    stage = "sft" if case == PEER else case
    _, device = devices(None)
    plans, _ = plan(config(folder, stage), stage, gpus=1, device=device, nodes=1, machine="gpu" if device.gpu else "cpu", knobs=False)
    return plans[0]


def parameters(found: Any) -> int:
    """Of the model that is trained."""
    from launch.plan.timing import shape_of

    return int(shape_of(found.work.job.config, scores=found.work.stage == "reward").parameters)


def work_of(found: Any, case: str) -> tuple[float, float]:
    """(tokens, floating-point operations) of one micro-step, of PPO of one iteration (its completions' tokens); attention scores left out."""
    from tests.bench.results import model_flops

    job = found.work.job
    if case == "ppo":
        settings = {"samples": job.rollout_rows, "completion_tokens": job.completion_tokens, "prompt_tokens": [found.work.rows.mean] * 2, "epochs": found.work.cfg.train.num_ppo_epochs}
        tokens = float(job.rollout_rows * job.completion_tokens)
        return tokens, model_flops(settings | {"model": job.config.to_dict()})
    tokens = job.sequences * found.work.rows.mean
    return tokens, PER_TOKEN[case] * parameters(found) * tokens


def run_stage(folder: Path, stage: str) -> tuple[list[float], int]:
    """(seconds of each micro-step or iteration, peak bytes) of the real stage; nothing is published."""
    from launch.plan.clocks import step_times
    from stages import models

    run = importlib.import_module("stages.ppo.train" if stage == "ppo" else f"stages.{stage}").main
    seconds: list[float] = []
    with ExitStack() as stack:
        stack.enter_context(step_times(stage, seconds))
        for module in ("stages.training.publish", "stages.ppo.train"):
            stack.enter_context(mock.patch(f"{module}.publish_checkpoint", return_value=""))
        peak = _peak(lambda: run(models.pinned(config(folder, stage))))
    return seconds, peak


def run_peer(folder: Path) -> tuple[list[float], int]:
    """The same SFT with TRL's own trainer and nothing of ours."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    from launch.plan.clocks import step_times

    cfg = config(folder, "sft")
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    rows = [json.loads(line) for line in (folder / "sft.jsonl").read_text().splitlines()]
    ids = [[*tokenizer(f"{row['prompt']} {row['completion']}")["input_ids"], tokenizer.eos_token_id] for row in rows]
    bf16 = cfg.train.precision == "bf16"
    arguments = SFTConfig(
        output_dir=str(folder / "out-peer"), per_device_train_batch_size=cfg.train.micro_batch_size, gradient_accumulation_steps=cfg.train.batch_size // cfg.train.micro_batch_size,
        max_steps=cfg.train.max_steps, learning_rate=cfg.train.learning_rate, max_length=cfg.max_length, bf16=bf16, use_cpu=not bf16, gradient_checkpointing=False,
        save_strategy="no", report_to="none", disable_tqdm=True, model_init_kwargs={"dtype": "float32"},
    )  # fmt: skip
    seconds: list[float] = []
    with step_times("sft", seconds):
        peak = _peak(lambda: SFTTrainer(str(folder / "base"), arguments, train_dataset=Dataset.from_list([{"input_ids": row} for row in ids]), processing_class=tokenizer).train())
    return seconds, peak


def _peak(run: Any) -> int:
    """The most bytes that tensors had: on a GPU by its allocator, else as the plan's tracker counts."""
    import torch

    from launch.plan.allocations import Allocations

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        run()
        return int(torch.cuda.max_memory_allocated())
    with Allocations() as tracker:
        run()
    return tracker.highest.total
