"""Run under accelerate launch by test_ppo_two_processes: everything that is compared between one process and two.

python -m tests.launch.ppo_worker FOLDER LABEL
"""

from __future__ import annotations

import sys
from pathlib import Path

from tests.stage.ppo_runs import LORA, run, settings

ADAPTER = {"kind": "model", "checkpoint": "reward/adapter"}
WHOLE = {"kind": "model", "checkpoint": "reward/whole"}
MODES = {
    "full": {"scorers": [WHOLE, {"kind": "python", "function": "tests.stage.ppo_runs:sometimes", "weight": 0.5}], "whiten_rewards": True},
    "lora": {"lora": LORA, "scorers": [ADAPTER]},
    "head": {"value_function": "head"},
    "generate": {"engine": "generate"},
    "continuous": {"lora": LORA, "scorers": [ADAPTER], "engine": "continuous"},
    "once": {"scorers": [WHOLE]},
    "mortal": {"scorers": [{"kind": "python", "function": "tests.stage.ppo_runs:mortal"}], "ema_decay": 0.8, "towards_start": 0.3},
}
MIXED = ("mortal", "once")
"""Modes with demonstrations mixed in: 5 of them per optimizer step, or 15, which two processes can't share out equally."""
UPDATES = [("copy", 1), ("copy", 3), ("lora", 1), ("lora", 3)]  # the value function, and rows of a micro-batch
TRAIN = {"iterations": 5, "rollout_batch_size": 12, "micro_batch_size": 2, "learning_rate": 3e-4, "value_warmup_iterations": 1, "save_every": 2}


def values_of(folder: Path, mode: str, label: str) -> dict:
    """The config of a mode; `once` is a single iteration of a single optimizer step."""
    train = TRAIN | ({"iterations": 1, "num_ppo_epochs": 1, "num_minibatches": 1, "value_warmup_iterations": 0} if mode == "once" else {})
    mix = {"ptx": {"data": str(folder / "demonstrations.jsonl"), "coef": 0.7, "ratio": 1.25 if mode == "once" else 0.8}} if mode in MIXED else {}
    watched = {"evaluation": {"every": 2, "prompts": str(folder / "held_out.jsonl"), "samples_per_prompt": 3}, "stopping": {"kl_budget": 50.0}}
    return settings(folder, f"{mode}-{label}", train, **MODES[mode], **mix, **(watched if mode == "lora" else {}))


def update(folder: Path, kind: str, micro: int) -> None:
    """One update from a fixed rollout, with SGD, in full or with adapters; rank 0 writes the new weights."""
    import torch
    from accelerate import Accelerator
    from safetensors.torch import save_file

    from stages.ppo.update import update_policy
    from tests.unit.ppo_samples import config
    from tests.unit.test_ppo_update import experience_of, module_of

    accelerator = Accelerator(cpu=True)
    module = module_of(kind=kind)
    experience = experience_of(module)
    cfg = config(train={"rollout_batch_size": 8, "num_ppo_epochs": 2, "num_minibatches": 2, "micro_batch_size": micro, "max_grad_norm": 0.5})
    metrics = update_policy(module, torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.5), accelerator, experience, cfg, 0)
    if accelerator.is_main_process:
        numbers = {f"metric:{k}": torch.tensor(v) for k, v in metrics.items()}
        tensors = {n: p.detach().clone() for n, p in module.named_parameters() if p.requires_grad}
        save_file(tensors | numbers, folder / f"update-{kind}-{micro}-{accelerator.num_processes}.safetensors")


def work(folder: Path, label: str) -> None:
    """All of it in this process (and its siblings)."""
    for kind, micro in UPDATES:
        update(folder, kind, micro)
    for mode in MODES:
        run(values_of(folder, mode, label))


if __name__ == "__main__":
    work(Path(sys.argv[1]), sys.argv[2])
