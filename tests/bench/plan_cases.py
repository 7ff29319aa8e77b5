"""What the benchmark of `align plan` measures: models, configs and machine files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from configs.machines import FOLDER

PROMPT = COMPLETION = 64  # tokens of every row
ROWS, MICRO_BATCH, RANK, PROCESSES = 16, 4, 8, 2
WORLDS = {
    "1M": {"layers": 2, "hidden": 128, "vocabulary": 2048},
    "5M": {"layers": 4, "hidden": 256, "vocabulary": 4096},
    "23M": {"layers": 6, "hidden": 512, "vocabulary": 8192},
}
STAGES, KINDS = ("sft", "reward", "dpo", "ppo"), ("full", "lora")
LAYOUTS = {"one": "cpu", "zero2": "cpu_zero2", "zero3": "cpu_zero3"}
# What the plan's rules were corrected by: of these cells the prediction is a fit, and no evidence for the plan.
FITTED = {f"{case}/zero3/1M" for case in ("sft-full", "sft-lora", "reward-full", "reward-lora", "dpo-full", "dpo-lora", "ppo-full", "ppo-backbone")} | {
    "reward-lora/zero2/23M", "reward-lora/zero3/23M", "dpo-lora/zero3/23M", "ppo-backbone/one/1M", "ppo-backbone/one/5M", "ppo-full/zero2/1M", "ppo-backbone/zero2/1M",
    "ppo-full/zero2/23M", "ppo-backbone/zero2/23M", "ppo-full/zero3/5M", "ppo-backbone/zero3/5M", "ppo-full/zero3/23M", "ppo-backbone/zero3/23M",
}  # fmt: skip
# Small enough that these models fill several of them; the shipped machine files have DeepSpeed's own of 2 GB, beside which nothing here would count.
BUCKETS = {"reduce_bucket_size": 1_000_000, "allgather_bucket_size": 1_000_000, "stage3_prefetch_bucket_size": 500_000, "stage3_param_persistence_threshold": 1000}


def name_of(stage: str, kind: str) -> str:
    """The name of a case within its world and layout; LoRA PPO is one backbone."""
    return f"{stage}-{'backbone' if (stage, kind) == ('ppo', 'lora') else kind}"


def prepare(folder: Path, world: str) -> None:
    """A random Llama as sft/one, two reward models on it (an adapter and a whole one), demonstrations, pairs and prompts."""
    from tests.bench import memory

    sizes = WORLDS[world]
    memory.prepare(folder, **sizes)
    rows = [json.loads(line) for line in (folder / "sft.jsonl").read_text().splitlines()][:ROWS]
    pairs = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": row["completion"][::-1]} for row in rows]
    for name, content in (("sft", rows), ("pairs", pairs), ("prompts", [{"prompt": row["prompt"]} for row in rows])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))


def settings(folder: Path, stage: str, kind: str, layout: str) -> dict[str, Any]:
    """The stage config of a case."""
    label = f"{name_of(stage, kind)}-{layout}"
    common = {"name": label, "registry": str(folder / "registry"), "output": str(folder / f"out-{label}"), "init_from": "sft/one",
              "split": {"validation": 0, "test": 0}, "max_length": PROMPT + COMPLETION + 2}  # fmt: skip
    common |= {"lora": {"rank": RANK, "alpha": 16}} if kind == "lora" else {}
    if stage != "ppo":
        train = {"max_steps": 2, "batch_size": ROWS, "micro_batch_size": MICRO_BATCH, "epochs": 2}
        return common | {"data": str(folder / ("sft.jsonl" if stage == "sft" else "pairs.jsonl")), "train": train}
    train = {"iterations": 2, "rollout_batch_size": ROWS, "num_ppo_epochs": 1, "micro_batch_size": MICRO_BATCH}
    return common | {
        "prompts": str(folder / "prompts.jsonl"), "scorers": [{"kind": "model", "checkpoint": f"reward/{'adapter' if kind == 'lora' else 'whole'}"}],
        "train": train, "sampling": {"max_new_tokens": COMPLETION, "stop_at_eos": False},
    }  # fmt: skip


def machine(folder: Path, layout: str) -> Path:
    """The machine file of a layout: the shipped one, with smaller buckets where it is DeepSpeed's."""
    shipped = yaml.safe_load((FOLDER / f"{LAYOUTS[layout]}.yaml").read_text())
    if layout != "one":
        stage = shipped.pop("deepspeed_config")["zero_stage"]
        del shipped["mixed_precision"]  # Accelerate takes it from DeepSpeed's file then
        deepspeed = {"zero_optimization": {"stage": stage, **BUCKETS, **({"stage3_gather_16bit_weights_on_model_save": True} if stage == 3 else {})},
                     "train_micro_batch_size_per_gpu": "auto", "train_batch_size": "auto", "gradient_accumulation_steps": "auto",
                     "gradient_clipping": "auto", "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False, "bf16": {"enabled": "auto"}}  # fmt: skip
        (folder / f"{layout}.json").write_text(json.dumps(deepspeed))
        shipped["deepspeed_config"] = {"deepspeed_config_file": str(folder / f"{layout}.json"), "deepspeed_multinode_launcher": "standard", "zero3_init_flag": stage == 3}
    path = folder / f"{layout}.yaml"
    path.write_text(yaml.safe_dump(shipped))
    return path
