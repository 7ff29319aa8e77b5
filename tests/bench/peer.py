"""One measurement of TRL 1.12's PPOTrainer, watched from outside: its functions are wrapped, none of its code is here.

Runs in a process whose PYTHONPATH begins with the folder that holds that version of trl.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from tests.bench.ours import device_facts
from tests.bench.peak import baseline, peak

VERSION = "1.12."


class Stopwatch:
    """Splits each update into rollout (until generation has returned), scoring (until the first gradient step) and update."""

    def __init__(self) -> None:
        self.updates: list[dict[str, float]] = []
        self._marks: dict[str, float] = {}
        self.restart()

    def restart(self) -> None:
        """An update begins."""
        self._marks = {"start": time.perf_counter(), "cpu": time.process_time()}

    def mark(self, name: str) -> None:
        """Remember when this happened first."""
        self._marks.setdefault(name, time.perf_counter())

    def lap(self) -> None:
        """An update is done, and the next one begins."""
        now, m = time.perf_counter(), self._marks
        self.updates.append({
            "seconds": now - m["start"], "cpu_seconds": time.process_time() - m["cpu"], "rollout": m["generated"] - m["start"],
            "scoring": m["gradients"] - m["generated"], "update": now - m["gradients"],
        })  # fmt: skip
        self.restart()


def measure(job: dict[str, Any], mode: str) -> dict[str, Any]:
    """Run the updates of a case; `mode` is full (four models) or lora (peft on the policy, whose base is the reference)."""
    import peft
    import torch
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from trl.experimental.ppo import PPOTrainer
    from trl.experimental.ppo import ppo_trainer as module

    assert trl.__version__.startswith(VERSION), f"found trl {trl.__version__}; the benchmark is against {VERSION}*"
    imports, case = baseline(), job["case"]
    tokenizer = AutoTokenizer.from_pretrained(job["policy"], padding_side="left")
    lora = peft.LoraConfig(r=case["lora_rank"], lora_alpha=2 * case["lora_rank"], target_modules="all-linear", task_type="CAUSAL_LM")
    reward, value = (AutoModelForSequenceClassification.from_pretrained(job["reward"], num_labels=1, dtype=torch.float32) for _ in range(2))
    policy, reference = (AutoModelForCausalLM.from_pretrained(job["policy"], dtype=torch.float32) if wanted else None for wanted in (True, mode == "full"))
    trainer = PPOTrainer(
        args=arguments(job), processing_class=tokenizer, model=policy, ref_model=reference, reward_model=reward, value_model=value,
        train_dataset=Dataset.from_dict({"input_ids": job["prompt_ids"]}), eval_dataset=Dataset.from_dict({"input_ids": job["prompt_ids"]}),
        peft_config=lora if mode == "lora" else None,
    )  # fmt: skip
    watch = Stopwatch()
    original = module.batch_generation
    _wrap(trainer, module, watch)
    try:
        trainer.train()
    finally:
        module.batch_generation = original
    return {"updates": watch.updates, "imports": imports, "peak": peak(), **device_facts()}


def _wrap(trainer: Any, module: Any, watch: Stopwatch) -> None:
    import torch
    from transformers import TrainerCallback

    generation, accumulate = module.batch_generation, trainer.accelerator.accumulate

    def synchronised(name: str) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        watch.mark(name)

    def generate(*args: Any, **kwargs: Any) -> Any:
        result = generation(*args, **kwargs)
        synchronised("generated")
        return result

    def accumulated(*args: Any, **kwargs: Any) -> Any:
        synchronised("gradients")
        return accumulate(*args, **kwargs)

    class Laps(TrainerCallback):
        def on_train_begin(self, *_args: Any, **_kwargs: Any) -> None:
            watch.restart()

        def on_step_end(self, *_args: Any, **_kwargs: Any) -> None:
            synchronised("end")
            watch.lap()

    module.batch_generation, trainer.accelerator.accumulate = generate, accumulated
    trainer.add_callback(Laps())


def arguments(job: dict[str, Any]) -> Any:
    """TRL's config with the case's settings; what it would add to the algorithm (sample tables, checkpoints, reports) is off."""
    import torch
    from trl.experimental.ppo import PPOConfig

    case = job["case"]
    return PPOConfig(
        output_dir=str(Path(job["folder"]) / "out" / "peer"), total_episodes=case["samples"] * (case["updates"] + 1),
        per_device_train_batch_size=case["micro_batch"], gradient_accumulation_steps=case["samples"] // case["micro_batch"], num_mini_batches=1,
        local_rollout_forward_batch_size=case["generate_batch"], num_ppo_epochs=case["epochs"], response_length=case["completion_tokens"],
        stop_token=None, missing_eos_penalty=None, temperature=1.0, kl_coef=0.05, cliprange=0.2, cliprange_value=0.2, vf_coef=0.1, gamma=1.0, lam=0.95,
        learning_rate=3e-6, adam_epsilon=1e-5, weight_decay=0.0, lr_scheduler_type="linear", bf16=case["precision"] == "bf16", gradient_checkpointing=False,
        use_cpu=not torch.cuda.is_available(), num_sample_generations=0, save_strategy="no", report_to="none", disable_tqdm=True, seed=0,
    )  # fmt: skip
