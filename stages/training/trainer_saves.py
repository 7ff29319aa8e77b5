"""A TRL trainer whose resumable saves are staged, sealed and read back (stages/training/saves.py), and whose resume goes on within a logging window.

transformers writes a save in place, file by file, and removes an older one before anything has looked at the new one. What it saves is kept: weights,
optimizer, scheduler, random state and its own state, each by the method that writes it; how they come to be a save is ours.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from blake3 import blake3

from configs.errors import UserError
from stages.compat import exportable
from stages.guard.skip import innermost
from stages.training import saves, watchdog
from stages.training.progress import remedy
from stages.training.ranks import from_rank_0, rank, say, world_size
from stages.training.rollback import weights_are_finite
from stages.training.saves import Failure, attempted
from stages.zero.shards import failures_kept


def saving(trainer_class: Any, stage: str) -> Any:
    """A subclass of a trainer class that saves and resumes as this module says. `depends_on` is set before it trains."""

    class Saving(trainer_class):
        depends_on: dict[str, Any] = {}  # noqa: RUF012 - replaced, never changed
        stepped = True  # since the newest save
        saved: str | None = None  # the newest save
        best_before: tuple[Any, ...] = (None, None, None)
        configured: list[Group] = []  # noqa: RUF012 - the optimizer's groups as it was made (stages/tuning/trainer.py)

        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            self.stepped = True
            return super().training_step(*args, **kwargs)

        def _determine_best_metric(self, metrics: dict[str, float], *args: Any, **kwargs: Any) -> Any:
            self.best_before = best_of(self)
            return self.args.metric_for_best_model in (None, *metrics) and super()._determine_best_metric(metrics, *args, **kwargs)  # not every evaluation generates

        def _save_checkpoint(self, *_: Any, **__: Any) -> None:
            save(self, warnings)

        def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
            super()._load_optimizer_and_scheduler(checkpoint)
            if checkpoint is not None:
                as_configured(self, self.configured)

        def _load_rng_state(self, checkpoint: str | None) -> None:
            if checkpoint is not None:
                restore_random(self, checkpoint, super()._load_rng_state)
                restore_running(self, Path(checkpoint))

        def _load_best_model(self) -> None:
            best = Path(self.state.best_model_checkpoint)
            with watchdog.during("load"):
                why = from_rank_0("verifying the best save", lambda: saves.problem(best) if best.is_dir() else "it is not there")
                if why is None:
                    super()._load_best_model()
            if why is not None:
                say(f"warning: {stage}: the best evaluated state, {best.name}, can't be used: {why}; the last one is published")

    warnings = saves.Warnings(stage)
    return Saving


def save(trainer: Any, warnings: saves.Warnings) -> bool:
    """Make a save of the step that was taken last, unless there is one; whether there is. Every process calls it.

    Raises:
        UserError: the weights are not finite.
        RuntimeError: on every process, where one failed otherwise than in writing.
    """
    refuse_not_finite(trainer)
    folder, name = Path(trainer.args.output_dir), f"checkpoint-{trainer.state.global_step}"
    if trainer.saved == name and not trainer.stepped:
        return True
    trainer.store_flos()
    state = trainer.state
    if state.best_global_step:
        state.best_model_checkpoint = str(folder / f"checkpoint-{state.best_global_step}")
    best = [Path(state.best_model_checkpoint).name] if state.best_model_checkpoint else []
    why = saves.store(folder, name, lambda staging: write(trainer, staging), trainer.depends_on, keep=best, kept=trainer.args.save_total_limit or saves.KEPT)
    if why is None:
        trainer.saved, trainer.stepped = name, False
    elif state.best_global_step == state.global_step:  # what is published is the best of those that were saved
        state.best_metric, state.best_global_step, state.best_model_checkpoint = trainer.best_before
    return warnings.outcome(f"the save of step {state.global_step}", why, trainer.saved)


def best_of(trainer: Any) -> tuple[Any, Any, Any]:
    """What the trainer's state says of the best evaluation."""
    return trainer.state.best_metric, trainer.state.best_global_step, trainer.state.best_model_checkpoint


def refuse_not_finite(trainer: Any) -> None:
    """Raise on every process where a trained weight of any is NaN or infinite: such weights go into no save."""
    if not weights_are_finite(trainer):
        step = trainer.state.global_step
        raise UserError(f"the weights are not finite at step {step}; the weights before this step are kept in the resumable saves. {remedy(trainer.args)}")


# -- writing


def write(trainer: Any, staging: Path) -> Failure | None:
    """This process's part of a save; what failed in writing it. Under DeepSpeed a collective."""
    target = str(staging)
    if not trainer.is_deepspeed_enabled:
        return attempted(lambda: _whole(trainer, staging))
    with failures_kept(trainer.model_wrapped) as kept:
        failed = attempted(lambda: trainer._save_optimizer_and_scheduler(target))
    if failed is not None and not failed.disk:
        raise RuntimeError(failed.words)  # it may have left a collective that the others are in: end this process, and the launcher ends them
    if kept:
        failed = attempted(kept[0])
    return failed or attempted(lambda: _rest(trainer, staging))


def _whole(trainer: Any, staging: Path) -> None:
    """All of it, where every process holds everything; rank 0 writes weights and optimizer."""
    trainer.save_model(str(staging), _internal_call=True)
    trainer._save_optimizer_and_scheduler(str(staging))
    _rest(trainer, staging)


def _rest(trainer: Any, staging: Path) -> None:
    """What is not weights and optimizer: random state and sums of this process; on rank 0 the trainer's state."""
    trainer._save_scaler(str(staging))
    trainer._save_rng_state(str(staging))
    (staging / f"running-{rank()}.json").write_text(json.dumps(running(trainer)))
    if rank():
        return
    (staging / "training_args.bin").unlink(missing_ok=True)  # a pickle that nothing reads
    if trainer.is_deepspeed_enabled:
        (staging / "latest").write_text(f"global_step{trainer.model_wrapped.global_steps}")
    for name, state in exportable(trainer):
        known = trainer.state.stateful_callbacks.get(name)
        trainer.state.stateful_callbacks[name] = [*known, state] if isinstance(known, list) else state
    trainer.state.save_to_json(str(staging / "trainer_state.json"))


# -- what the config says of the optimizer


class Group(NamedTuple):
    """A group of the optimizer as it was made."""

    settings: dict[str, Any]  # such as weight decay and betas
    empty: bool  # adapters alone leave the group without decay empty, and DeepSpeed takes it out at ZeRO-3


def settings_of(trainer: Any) -> list[Group]:
    """What the optimizer's groups were made with; without their parameters."""
    groups = innermost(trainer.optimizer).param_groups
    return [Group({key: value for key, value in group.items() if key != "params"}, not group["params"]) for group in groups]


def as_configured(trainer: Any, groups: list[Group]) -> None:
    """Put the config's settings back after a save was loaded: it brings back its own, so a learning rate or a weight decay that was allowed to change
    would be recorded but never used. `groups`: `settings_of` the optimizer as it was made."""
    now, scheduler = innermost(trainer.optimizer).param_groups, trainer.lr_scheduler
    scheduler = getattr(scheduler, "scheduler", scheduler)
    kept = groups if len(now) == len(groups) else [group for group in groups if not group.empty]
    assert len(now) == len(kept), f"the optimizer has {len(now)} groups of parameters and was made with {len(kept)}"
    scheduled = groups if len(scheduler.lr_lambdas) == len(groups) else kept
    scheduler.base_lrs = [group.settings["lr"] for group in scheduled]
    scheduler._last_lr = [base * share(scheduler.last_epoch) for base, share in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    for group, made in zip(now, kept, strict=True):
        place = next(i for i, one in enumerate(scheduled) if one is made)
        group.update(made.settings)
        group["initial_lr"], group["lr"] = scheduler.base_lrs[place], scheduler._last_lr[place]


# -- what has been summed up since the last log


def running(trainer: Any) -> dict[str, Any]:
    """What the trainer has summed up since it last logged: without it the next line of a resumed run would tell of the steps after the save only."""
    return {
        "loss": float(trainer._tr_loss), "total": float(trainer._total_loss_scalar), "logged": int(trainer._globalstep_last_logged),
        "metrics": {mode: dict(values) for mode, values in getattr(trainer, "_metrics", {}).items()}, "tokens": getattr(trainer, "_total_train_tokens", 0),
        "seen": seen.tolist() if (seen := getattr(trainer, "seen", None)) is not None else None,
    }  # fmt: skip


def restore_running(trainer: Any, checkpoint: Path) -> None:
    """Put it back. Where the number of processes has changed each gets the mean of their losses, which is what a log shows."""
    found = {saves.owner(file.name, 2**31): json.loads(file.read_text()) for file in checkpoint.glob("running-*.json")}
    if not found:
        return
    mine = found[rank()] if len(found) == world_size() else found[0] | {"loss": sum(one["loss"] for one in found.values()) / len(found)}
    trainer._tr_loss = torch.full_like(trainer._tr_loss, mine["loss"])
    trainer._total_loss_scalar, trainer._globalstep_last_logged = mine["total"], mine["logged"]
    if mine.get("seen") is not None:
        trainer.seen = torch.tensor(mine["seen"], dtype=torch.float32 if trainer.args.device.type == "mps" else torch.float64, device=trainer.args.device)
    for mode, values in mine["metrics"].items():
        trainer._metrics[mode].clear()
        trainer._metrics[mode].update({key: list(value) for key, value in values.items()})
    if hasattr(trainer, "_total_train_tokens"):
        trainer._total_train_tokens = mine["tokens"]


def restore_random(trainer: Any, checkpoint: str, load: Callable[[str], None]) -> None:
    """Put the random state of a save back, which `load` does, unless another number of processes made it."""
    if saves.read_seal(Path(checkpoint))["depends_on"].get("processes", world_size()) == world_size():
        load(checkpoint)
    else:
        draw_anew(trainer.args.seed, trainer.state.global_step)


def draw_anew(seed: int, step: int) -> None:
    """Seed this process for a save that another number of processes made: theirs can't be handed on, and without this all would repeat the
    dropout that the run began with. A function of seed, step and rank, so that doing it again gives the same.
    """
    import numpy

    number = int.from_bytes(blake3(f"{seed}/{step}/{rank()}/{world_size()}".encode()).digest()[:4])
    random.seed(number)
    numpy.random.seed(number)
    torch.manual_seed(number)
