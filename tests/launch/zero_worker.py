"""Run under accelerate launch by test_zero: every case of the equality matrix in these processes, one after the other.

python -m tests.launch.zero_worker FOLDER LABEL [CASE ...]
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import zlib
from pathlib import Path
from typing import Any

from tests.stage.runs import run, settings, workspace
from tests.tiny import tiny_model

LORA = {"rank": 4, "alpha": 8.0}
STAGES = ("sft", "reward", "dpo")
WRITTEN = {"kind": "python", "function": "tests.launch.zero_worker:written"}
EVALUATED = {"metrics": [WRITTEN, "accuracy"], "generate": {"rows": 3, "max_new_tokens": 6}}  # of sft-full: ZeRO-3 gathers the weights for it
# Clipping at every step, four micro-batches per step on one process and two on each of two.
TRAIN = {"max_steps": 4, "batch_size": 8, "micro_batch_size": 2, "learning_rate": 1e-3, "max_grad_norm": 0.5, "eval_every": 2}


def written(prompts: list[str], completions: list[str], references: list[str]) -> float:
    """A number that any other completion of any row would change; a model of a few steps says nothing that other metrics would tell from silence."""
    return zlib.crc32("\n".join(map(repr, completions)).encode()) / 2**32 if any(completions) else -1.0


def cases(folder: Path, label: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """Case -> its stage and config."""
    found = {}
    for stage in STAGES:
        for kind, changes in {"full": {}, "lora": {"lora": LORA}}.items():
            case = f"{stage}-{kind}"
            changes = {**changes, "evaluation": EVALUATED} if case == "sft-full" else changes
            found[case] = (stage, settings(folder, stage, TRAIN, name=f"{kind}-{label}", output=str(folder / f"out-{case}-{label}"), **changes))
    return found | (extras(folder, label) if label in ("one", "zero3") else {}) | techniques(folder, label)


def techniques(folder: Path, label: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """SFT by techniques that ZeRO might break: at ZeRO-3 those that it takes, at ZeRO-2 those that need whole weights."""
    at_3 = {
        "ia3": {"tune": {"method": "ia3"}}, "frozen": {"init_from": str(folder / "half"), "tune": {"method": "full", "freeze": {"first": 1, "embeddings": True}}},
        "loraplus": {"lora": LORA | {"rslora": True, "learning_rate_ratio": 8.0}}, "smoothed": {"train": {"label_smoothing": 0.1, "rehearsal": {"data": str(folder / "sft.jsonl"), "share": 0.25}}},
    }  # fmt: skip
    at_2 = {"dora": {"lora": LORA | {"dora": True}}, "pissa": {"lora": LORA | {"init": "pissa"}}}
    chosen = at_3 | at_2 if label == "one" else {"zero2": at_2, "zero3": at_3}.get(label, {})
    return {
        name: ("sft", settings(folder, "sft", TRAIN | changes.get("train", {}), name=f"{name}-{label}", output=str(folder / f"out-{name}-{label}"), **{k: v for k, v in changes.items() if k != "train"}))
        for name, changes in chosen.items()
    }


def extras(folder: Path, label: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """What ZeRO-3 might break besides: models that are merged, grown, packed, recomputed, stopped; other precisions and optimizers."""

    def case(name: str, stage: str, train: dict[str, Any] | None = None, **changes: Any) -> tuple[str, dict[str, Any]]:
        return stage, settings(folder, stage, TRAIN | (train or {}), name=f"{name}-{label}", output=str(folder / f"out-{name}-{label}"), **changes)

    grown = {"init_from": str(folder / "grown"), "lora": LORA}
    return {
        "merged-sft": case("merged-sft", "sft", init_from=f"sft/lora-{label}"),
        "merged-reward": case("merged-reward", "reward", init_from=f"reward/lora-{label}", lora=LORA),
        "merged-dpo": case("merged-dpo", "dpo", init_from=f"sft/lora-{label}", reference=f"sft/full-{label}", lora=LORA),
        "grown-sft": case("grown-sft", "sft", **grown),
        "grown-dpo": case("grown-dpo", "dpo", init_from=f"sft/grown-sft-{label}"),
        "packed": case("packed", "sft", packing=True, max_length=64),
        "recomputed": case("recomputed", "dpo", {"gradient_checkpointing": True}, lora=LORA),
        "stopped": case("stopped", "sft", {"max_steps": 10, "eval_every": 1, "early_stopping_patience": 2, "learning_rate": 0.1}),
        "sgd": case("sgd", "sft", {"learning_rate": 0.5}, trainer={"optim": "sgd"}),
        "ipo": case("ipo", "dpo", loss_type="ipo"),
        "bf16": case("bf16", "reward", {"precision": "bf16"}),
        "on": case("on", "sft", init_from=f"sft/full-{label}", evaluation=EVALUATED, continued={"old": [{"of": f"sft/full-{label}@1", "data": str(folder / "sft.jsonl")}]}),
        "bf16-lora": case("bf16-lora", "reward", {"precision": "bf16"}, lora=LORA),
    }


def prepare(folder: Path) -> Path:
    """The workspace of the supervised stages; half/, its base in bfloat16; and grown/, one whose tokenizer has no pad token, so that a stage adds a row for it."""
    import torch
    from transformers import AutoModelForCausalLM

    workspace(folder, rows=66)
    shutil.copytree(folder / "base", folder / "half")
    AutoModelForCausalLM.from_pretrained(folder / "base").to(torch.bfloat16).save_pretrained(folder / "half")
    tiny_model(folder / "grown", seed=1, vocabulary=258, tie_word_embeddings=False, pad_token_id=None, bos_token_id=256, eos_token_id=257)
    tokenizer = json.loads((folder / "grown" / "tokenizer.json").read_text())
    tokenizer["added_tokens"] = [token | {"id": token["id"] - 1} for token in tokenizer["added_tokens"] if token["content"] != "<pad>"]
    del tokenizer["model"]["vocab"]["<pad>"]
    tokenizer["model"]["vocab"] |= {"<bos>": 256, "<eos>": 257}
    (folder / "grown" / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings_file = folder / "grown" / "tokenizer_config.json"
    settings_file.write_text(json.dumps({key: value for key, value in json.loads(settings_file.read_text()).items() if key != "pad_token"}))
    return folder


def facts_of(trainer: Any) -> dict[str, Any]:
    """What the engine was told, and how much of the model this process holds."""
    parameters = list(trainer.model.parameters())
    parts = [p.to_local() if hasattr(p, "to_local") else getattr(p, "ds_tensor", p) for p in parameters]  # of FSDP2, of ZeRO-3, or the whole
    held, whole = sum(part.numel() for part in parts), sum(getattr(p, "ds_numel", p.numel()) for p in parameters)
    engine = trainer.model_wrapped
    if not trainer.is_deepspeed_enabled:
        return {"held": held, "whole": whole}
    return {
        "held": held, "whole": whole, "clipping": engine.gradient_clipping(), "accumulation": engine.gradient_accumulation_steps(),
        "micro_batch": engine.train_micro_batch_size_per_gpu(), "stage": engine.zero_optimization_stage(),
    }  # fmt: skip


def work(folder: Path, label: str, chosen: list[str]) -> None:
    """Every case; rank 0 writes what it saw of the engines, and how many numbers of a model it held once that was loaded."""
    from stages import models
    from stages.training import resume

    seen: dict[str, Any] = {}
    loaded: list[int] = []
    train, load = resume.train, models.load_policy

    def observed(trainer: Any, *arguments: Any) -> None:
        train(trainer, *arguments)
        seen[case] = facts_of(trainer) | {"loaded": max(loaded)}
        loaded.clear()

    def observed_load(*arguments: Any, **keywords: Any) -> Any:
        model = load(*arguments, **keywords)
        loaded.append(sum(p.numel() + getattr(p, "ds_tensor", p[:0]).numel() for p in model.parameters()))
        return model

    resume.train, models.load_policy = observed, observed_load
    for case, (stage, values) in cases(folder, label).items():
        if not chosen or case in chosen:
            run(stage, values)
    if os.environ.get("RANK", "0") == "0":
        (folder / f"facts-{label}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    work(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
