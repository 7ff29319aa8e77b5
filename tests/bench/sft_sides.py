"""One measurement of SFT: our stage's own `main`, or a plain TRL SFTTrainer, in this process, with a clock around each optimizer step."""

from __future__ import annotations

import math
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from tests.bench.cases import PAD
from tests.bench.ours import device_facts
from tests.bench.peak import baseline, peak
from tests.bench.sft_cases import SFTCase, held_out_loss

RANK = 16


def case_of(job: dict[str, Any]) -> SFTCase:
    """The case of a job that was read from JSON."""
    return SFTCase(**(job["case"] | {"tokens": tuple(job["case"]["tokens"])}))


def clock() -> Any:
    """A callback that notes the time at the start of training and after each optimizer step, and the tokens of every forward pass."""
    import torch
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        times: list[float]
        cpu: list[float]

        def on_train_begin(self, *_args: Any, **_kwargs: Any) -> None:
            self.times, self.cpu = [time.perf_counter()], [time.process_time()]

        def on_step_end(self, *_args: Any, **_kwargs: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.times.append(time.perf_counter())
            self.cpu.append(time.process_time())

    return Clock()


def count_tokens(trainer: Any) -> list[int]:
    """A list to which every forward pass of `trainer`'s training adds its tokens that are no padding."""
    counts: list[int] = []
    inner = trainer.training_step

    def counting(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        counts.append(int((inputs["input_ids"] != PAD).sum()))
        return inner(model, inputs, *args, **kwargs)

    trainer.training_step = counting
    return counts


def facts(watch: Any, tokens: list[int], case: SFTCase, imports: float, highest: float, on_device: dict[str, Any], loss: float) -> dict[str, Any]:
    """What a measurement hands back. Steps in seconds; tokens of each step."""
    per_step = len(tokens) // (len(watch.times) - 1)
    grouped = [sum(tokens[i : i + per_step]) for i in range(0, len(tokens), per_step)]
    return {
        "seconds": [after - before for before, after in pairwise(watch.times)], "cpu_seconds": [after - before for before, after in pairwise(watch.cpu)],
        "tokens": grouped, "imports": imports, "peak": highest, "eval_loss": loss, "rows": case.batch, **on_device,
    }  # fmt: skip


def ours(job: dict[str, Any], seed: int) -> dict[str, Any]:
    """Run the SFT stage up to the point where it would publish. What is set here is the case; the rest is the stage's default."""
    from configs.schema import SFTStage
    from stages import sft
    from stages.training import build, publish, resume

    case, folder = case_of(job), Path(job["folder"])
    cfg = SFTStage.model_validate(settings(case, folder, seed))
    imports = baseline()
    kept: dict[str, Any] = {}
    build_inner, publish_inner, train_inner = build.build, publish.publish, resume.train

    def built(*args: Any, **kwargs: Any) -> Any:
        trainer = build_inner(*args, **kwargs)
        kept.update(trainer=trainer, watch=clock(), tokens=count_tokens(trainer))
        trainer.add_callback(kept["watch"])
        return trainer

    def trained(*args: Any, **kwargs: Any) -> Any:
        result = train_inner(*args, **kwargs)
        kept.update(peak=peak(), device=device_facts())
        return result

    build.build, publish.publish, resume.train = built, lambda *_args, **_kwargs: "", trained
    try:
        sft.main(cfg)
    finally:
        build.build, publish.publish, resume.train = build_inner, publish_inner, train_inner
    loss = held_out_loss(kept["trainer"].model, folder)
    return facts(kept["watch"], kept["tokens"], case, imports, kept["peak"], kept["device"], loss)


def settings(case: SFTCase, folder: Path, seed: int) -> dict[str, Any]:
    """The stage's config."""
    lora = {"lora": {"rank": RANK, "alpha": 2.0 * RANK}} if case.setting == "lora" else {}
    return {
        "name": "bench", "registry": str(folder / "registry"), "output": str(folder / "out"), "init_from": str(folder / "base"), "template": "raw", "seed": seed,
        "data": str(folder / "train.jsonl"), "split": {"validation": 0, "test": 0}, "max_length": case.max_length, "packing": case.setting == "packed", **lora,
        "train": {
            "max_steps": case.steps, "batch_size": case.batch, "micro_batch_size": case.micro_batch, "learning_rate": case.learning_rate, "precision": case.precision,
            "save_every": 10_000, "gradient_checkpointing": case.setting == "checkpointed",
        },
    }  # fmt: skip


def peer(job: dict[str, Any], seed: int) -> dict[str, Any]:
    """Train with TRL's SFTTrainer as its documentation shows it, on the same rows, without saving."""
    import peft
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    case, folder = case_of(job), Path(job["folder"])
    imports = baseline()
    data = load_dataset("json", data_files=str(folder / "train.jsonl"), split="train", cache_dir=str(folder / "cache"))
    arguments = SFTConfig(**trl_settings(case, folder, seed))
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder / "base", dtype="float32"), args=arguments, train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(folder / "base"),
        peft_config=peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM") if case.setting == "lora" else None,
    )  # fmt: skip
    watch, tokens = clock(), count_tokens(trainer)
    trainer.add_callback(watch)
    trainer.train()
    highest, on_device = peak(), device_facts()
    return facts(watch, tokens, case, imports, highest, on_device, held_out_loss(trainer.model, folder))


def trl_settings(case: SFTCase, folder: Path, seed: int) -> dict[str, Any]:
    """TRL's arguments for a case: those of `settings`; what TRL has by default and the case does not name stays."""
    import torch

    return {
        "output_dir": str(folder / "out-peer"), "seed": seed, "max_steps": case.steps, "per_device_train_batch_size": case.micro_batch,
        "gradient_accumulation_steps": case.batch // case.micro_batch, "learning_rate": case.learning_rate, "lr_scheduler_type": "linear", "warmup_steps": math.ceil(0.03 * case.steps),
        "weight_decay": 0.0, "max_grad_norm": 1.0, "bf16": case.precision == "bf16", "use_cpu": not torch.cuda.is_available(),
        "gradient_checkpointing": case.setting == "checkpointed", "max_length": case.max_length, "packing": case.setting == "packed",
        "logging_steps": 10, "disable_tqdm": True, "report_to": "none", "save_strategy": "no",
    }  # fmt: skip
