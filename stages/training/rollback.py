"""Going back to a save in the middle of a run: which save is healthy, and how its weights and optimizer are put in place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from stages.guard.skip import innermost
from stages.training import pickles, saves
from stages.training.ranks import from_rank_0


def weights_are_finite(trainer: Any) -> bool:
    """Whether every trained weight is a finite number on every rank; of ZeRO-3 each looks at its share. A collective."""
    shares = [getattr(p, "ds_tensor", p).detach() for p in trainer.model.parameters() if p.requires_grad]
    broken = torch.stack([~torch.isfinite(share).all() for share in shares]).any().float().to(trainer.args.device)
    return not trainer.accelerator.reduce(broken, "sum")


def remembers(save: Path) -> dict[str, Any]:
    """What the guard knew when a save was made; {} where there was none."""
    state = json.loads((save / "trainer_state.json").read_text(encoding="utf-8"))
    return dict(state.get("stateful_callbacks", {}).get("SkipSteps", {}).get("attributes", {}))


def healthy_save(folder: str) -> Path | None:
    """The newest save that verifies and whose last optimizer step was taken. A collective: rank 0 reads, every rank learns."""

    def newest() -> Path | None:
        found = (save for save in saves.saves(Path(folder)) if saves.problem(save) is None)
        return next((save for save in found if not remembers(save).get("guard", {}).get("streak", 0)), None)

    return from_rank_0("looking for a healthy save", newest)


def restore(trainer: Any, save: Path) -> None:
    """Put the weights and the optimizer's state of a verified save into the running trainer, and remove what is newer. A collective.

    Learning rates stay as the schedule has set them for the next step.
    """
    pickles.check(save)
    inner = innermost(trainer.optimizer)
    rates = [group["lr"] for group in inner.param_groups]
    if trainer.is_deepspeed_enabled:
        strict = not hasattr(trainer.model, "peft_config")
        trainer.model_wrapped.load_checkpoint(str(save), load_module_strict=strict, load_optimizer_states=True, load_lr_scheduler_states=False)
    else:
        trainer._load_from_checkpoint(str(save))
        state = torch.load(save / "optimizer.pt", map_location="cpu", weights_only=True)
        trainer.optimizer.load_state_dict(state)
    for group, rate in zip(inner.param_groups, rates, strict=True):
        group["lr"] = rate
    saves.retire_newer(save)


def deepspeed_norm(engine: Any) -> Any:
    """The gradient norm of the step that a DeepSpeed engine's ZeRO optimizer is about to take; negative where it is not finite."""
    zero = engine.optimizer
    return -1.0 if zero.overflow else zero._global_grad_norm
