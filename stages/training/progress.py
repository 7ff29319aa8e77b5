"""One readable line per log on rank 0, and every metric in OUTPUT/metrics.jsonl under the project's names."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from stages.health.findings import PREFIX
from stages.training.lines import Appended
from stages.training.plan import Plan
from stages.training.ranks import say
from stages.training.saves import write_durably

# TRL's names in logs -> ours.
NAMES = {
    "loss": "loss", "mean_token_accuracy": "token_accuracy", "token_accuracy": "token_accuracy", "entropy": "entropy", "accuracy": "accuracy", "margin": "margin",
    "mean_reward": "score", "rewards/accuracies": "accuracy", "rewards/margins": "margin",
    "logps/chosen": "chosen_logprobs", "logps/rejected": "rejected_logprobs", "rehearsal_loss": "rehearsal_loss", "objective": "objective",
}  # fmt: skip

WATCHED = ("forgetting/", "data/")  # lines of their own, of a run that is watched (stages/training/watching.py)
MEANS_OF_MEANS = {"dpo": ("mean_token_accuracy", "entropy")}  # TRL's, over micro-batches: they depend on how the batch is cut, so they are left out
OLDER = ("eval_loss", "eval_token_accuracy")  # metrics of an SFT evaluation that keep sft/NAME beside evaluation/NAME
SKIPPED = "train/skipped_steps"  # optimizer steps that were not taken, since the run began


def named(stage: str, logs: dict[str, Any]) -> dict[str, float]:
    """The entries of a Trainer log that we keep, renamed: loss -> sft/loss, eval_loss -> sft/eval_loss.

    What SFT measures on held-out rows is all named evaluation/…, as in PPO; its loss and token accuracy are there under their older names too.
    """
    out = {}
    for key, value in logs.items():
        if stage == "sft" and key.startswith("eval_") and isinstance(value, (int, float)):
            out[public(key.removeprefix("eval_"))] = value
            if key not in OLDER:
                continue
        prefix, bare = ("eval_", key[5:]) if key.startswith("eval_") else ("", key)
        if bare in NAMES and bare not in MEANS_OF_MEANS.get(stage, ()) and isinstance(value, (int, float)):
            out[f"{stage}/{prefix}{NAMES[bare]}"] = value
        elif key in ("learning_rate", "grad_norm", SKIPPED) or key.startswith((*WATCHED, PREFIX)):
            out[key] = value
    return out


def public(key: str) -> str:
    """What an SFT evaluation's metric is called in metrics.jsonl, configs and manifests: evaluation/rougeL."""
    return f"evaluation/{NAMES.get(key, key)}"


def duration(seconds: float) -> str:
    """A time as 45s, 1m20s or 2h05m."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    return f"{seconds // 60}m{seconds % 60:02d}s" if seconds < 3600 else f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"


class Progress(TrainerCallback):
    """Prints `sft 40/120  loss 1.234  lr 9.1e-04  12.3 rows/s  1m20s left` and keeps metrics.jsonl.

    A resumed run first cuts metrics.jsonl back to the step it resumes from, so the file reads like that of an
    uninterrupted run.
    """

    def __init__(self, stage: str, plan: Plan, metrics_file: Path) -> None:
        self.stage, self.plan, self.file = stage, plan, metrics_file
        self.lines = Appended(metrics_file)
        self.eval_loss: float | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock and drop metrics of steps that will be taken again."""
        self.began = self.last = time.monotonic()
        self.first_step = self.last_step = state.global_step
        if state.is_world_process_zero:
            keep = [line for line in read_lines(self.file) if 0 < state.global_step >= json.loads(line)["step"]]
            write_durably(self.file, "".join(line + "\n" for line in keep))  # a kill in between must not cost the lines of hours

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Write and print one log."""
        logs = logs or {}
        metrics = named(self.stage, logs)
        if f"{self.stage}/loss" not in metrics and f"{self.stage}/eval_loss" not in metrics and not any(key.startswith(WATCHED) for key in metrics):
            return  # the Trainer's closing summary
        self.eval_loss = metrics.get(f"{self.stage}/eval_loss", self.eval_loss)
        if state.is_world_process_zero:
            self.lines.add(json.dumps({"step": state.global_step, **metrics}) + "\n")
        say(self.eval_line(state, metrics) if f"{self.stage}/loss" not in metrics else self.train_line(state, metrics))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """What a save comes after must be in the file before a resume."""
        self.lines.flush()

    on_train_end = on_save

    def train_line(self, state: Any, metrics: dict[str, float]) -> str:
        """The line of a training log."""
        now = time.monotonic()
        rate = (state.global_step - self.last_step) * self.plan.batch_size / max(now - self.last, 1e-9)
        mean = (now - self.began) / max(state.global_step - self.first_step, 1)
        self.last, self.last_step = now, state.global_step
        general = f"  rehearsal_loss {metrics[key]:.4g}" if (key := f"{self.stage}/rehearsal_loss") in metrics else ""
        evaluated = "" if self.eval_loss is None else f"  eval_loss {self.eval_loss:.4g}"
        return (
            f"{self.stage} {state.global_step}/{state.max_steps}  loss {metrics[f'{self.stage}/loss']:.4g}{general}  "
            f"lr {metrics.get('learning_rate', 0.0):.1e}{evaluated}  {rate:.1f} rows/s  "
            f"{duration(mean * (state.max_steps - state.global_step))} left"
        )

    def eval_line(self, state: Any, metrics: dict[str, float]) -> str:
        """The line of an evaluation, or of what a watched run looks at besides, whose names are shown whole: forgetting/perplexity is not the evaluation's."""
        at = f"{self.stage} {state.global_step}/{state.max_steps}  "
        watched = {key: value for key, value in metrics.items() if key.startswith(WATCHED) and key != "forgetting/start"}
        shown = {key: value for key, value in metrics.items() if key.startswith("evaluation/")} or {key: value for key, value in metrics.items() if not key.startswith((PREFIX, *WATCHED))}
        if not shown:
            return at + "  ".join(f"{key} {value:.4g}" for key, value in watched.items())
        return at + ("evaluation: " if self.stage == "sft" else "") + "  ".join(f"{key.split('/', 1)[1]} {value:.4g}" for key, value in shown.items())


def remedy(arguments: Any) -> str:
    """What to try when numbers have gone bad; `arguments` are the trainer's, which know whether it computes in 16 bits."""
    precision = "use train.precision=fp32, " if arguments.bf16 or arguments.fp16 else ""
    return f"Lower train.learning_rate, {precision}or look for broken rows (`align data check`), then run again"


def read_lines(file: Path) -> list[str]:
    """The complete JSON lines of a file that a killed process may have cut."""
    if not file.exists():
        return []
    text = file.read_text()
    return text.split("\n")[:-1]
