"""Resumable saves: verified by hash before they are opened, and refused when what they were made from has changed.

The Trainer writes a save file by file; a kill leaves a folder that its own resume would pick and die on. So a list of the
BLAKE3 hash of every file is written last, and resume takes the newest save that agrees with its list.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from transformers import TrainerCallback

from configs.errors import UserError
from configs.schema import StageConfig, TRLStage
from stages.training.evaluation import stopped_early
from stages.training.progress import not_finite
from stages.training.ranks import rank, say, wait_for_everyone, world_size
from stages.zero.machine import zero_stage

SEAL = "sealed.json"  # in a save: {relative path: [bytes, blake3]}
IDENTITY = "identity.json"  # beside the saves: what they were made from
NOT_COMPARED = {"allow_changed", "machine", "processes", "output", "registry", "health", "offload_frozen"}  # none of them changes what is computed


def file_hash(file: Path) -> str:
    """BLAKE3 of a file's bytes."""
    hasher = blake3()
    hasher.update_mmap(file)
    return hasher.hexdigest()


def write_durably(file: Path, text: str) -> None:
    """Write a file so that after a crash it holds either all of the text or what it held before."""
    staging = file.with_name(f".{file.name}.{os.getpid()}")
    with staging.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    staging.replace(file)


def files_below(folder: Path) -> dict[str, Path]:
    """Every file of a save but its seal, by relative path."""
    return {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != SEAL}


def seal(save: Path) -> None:
    """Write the list of hashes, last."""
    listed = {name: [path.stat().st_size, file_hash(path)] for name, path in files_below(save).items()}
    for path in files_below(save).values():
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
    write_durably(save / SEAL, json.dumps(listed))


def problem(save: Path) -> str | None:
    """Why a save can't be resumed from, or None when every file is as it was written."""
    try:
        listed = json.loads((save / SEAL).read_text())
    except FileNotFoundError:
        return "it was not finished"
    except ValueError:
        return f"{SEAL} is damaged"
    found = files_below(save)
    if set(found) != set(listed):
        return f"its files differ from its list: {', '.join(sorted(set(found) ^ set(listed))[:3])}"
    for name, (size, digest) in listed.items():
        if found[name].stat().st_size != size or file_hash(found[name]) != digest:
            return f"{name} is damaged"
    return None


def saves(folder: Path) -> list[Path]:
    """The saves of a run, newest first."""
    found = [path for path in folder.glob("checkpoint-*") if path.is_dir() and path.name.split("-")[1].isdigit()]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]), reverse=True)


class SealSaves(TrainerCallback):
    """Seals each save once all ranks have written their part, unless a trained weight is NaN or infinite."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """All ranks agree that the weights are finite, else all raise and the save stays unsealed; rank 0 seals."""
        trained = [getattr(p, "ds_tensor", p) for p in self.trainer.model.parameters() if p.requires_grad]  # of ZeRO-3 this rank's share
        broken = torch.stack([~torch.isfinite(p.detach()).all() for p in trained]).any().float().to(args.device)
        if self.trainer.accelerator.reduce(broken, "sum"):
            raise UserError(not_finite("the weights are not finite", state.global_step))
        if state.is_world_process_zero:
            seal(Path(args.output_dir) / f"checkpoint-{state.global_step}")
        wait_for_everyone()


def identity(cfg: StageConfig, *, data: Any, tokenizer: str, parents: list[str]) -> dict[str, Any]:
    """What a save depends on: data fingerprint, tokenizer digest, number of processes, config and parents."""
    config = {key: value for key, value in cfg.model_dump(mode="json").items() if key not in NOT_COMPARED}
    return {"data": data, "tokenizer": tokenizer, "processes": world_size(), "config": config | {"parents": parents}}


def changed(before: dict[str, Any], now: dict[str, Any], allowed: list[str]) -> list[str]:
    """What differs and is not allowed to, in words."""
    out = []
    for key in ("data", "tokenizer", "processes", "config"):
        if before.get(key) == now[key] or key in allowed:
            continue
        if key == "config":
            old = before.get(key) or {}
            out += [f"config: {name} was {old.get(name)!r}, is {value!r}" for name, value in now[key].items() if old.get(name) != value]
        else:
            out.append(f"{key} was {before.get(key)}, is {now[key]}")
    zero = [identity.get("zero_stage", 0) for identity in (before, now)]
    if zero[0] != zero[1]:  # never allowed: a save's shards are laid out for one stage
        out.append(f"zero_stage was {zero[0]}, is {zero[1]} (the machine file's; 0: no DeepSpeed), and a save is continued under its own only")
    return out


def choose_save(folder: Path, cfg: StageConfig, now: dict[str, Any]) -> Path | None:
    """The newest save that verifies, or None to start anew. Newer saves that do not verify are named and removed.

    Every rank decides by the same files; rank 0 alone writes and removes, after all have decided.

    Raises:
        UserError: the saves were made from other data, tokenizer, number of processes or config.
    """
    verdicts = [(save, problem(save)) for save in saves(folder)]
    chosen = next((save for save, why in verdicts if why is None), None)
    recorded = folder / IDENTITY
    if chosen is not None:
        before = json.loads(recorded.read_text()) if recorded.exists() else {}
        differences = changed(before, now, cfg.allow_changed)
        if differences:
            raise UserError(
                f"{folder} holds an interrupted run that was made otherwise: {'; '.join(differences)}. "
                f"Change it back to continue, delete {folder} to start anew, "
                "or list what may differ in allow_changed (data, tokenizer, processes, config)"
            )
    wait_for_everyone()
    if rank() == 0:
        for save, why in verdicts:
            if why is not None:
                say(f"resume: {save.name} is ignored and removed: {why}")
                shutil.rmtree(save)
        folder.mkdir(parents=True, exist_ok=True)
        write_durably(recorded, json.dumps(now))
    wait_for_everyone()
    if chosen is not None:
        say(f"resume: continuing from {chosen.name}")
    return chosen


def steps_to_train(save: Path | None, planned: int, patience: int | None) -> int:
    """The step to stop at: the plan's, or the save's own when that run had already stopped early."""
    if save is None:
        return planned
    state = json.loads((save / "trainer_state.json").read_text())
    return int(state["global_step"]) if stopped_early(state["log_history"], patience) else planned


def train(trainer: Any, cfg: TRLStage, now: dict[str, Any]) -> None:
    """Train, from the newest sound save of an interrupted run where there is one; `now` is the run's `identity`.

    Raises:
        UserError: the saves were made from other inputs or under another ZeRO stage, or the loss is not finite.
    """
    save = choose_save(Path(trainer.args.output_dir), cfg, now | {"zero_stage": zero_stage()})
    steps = steps_to_train(save, trainer.args.max_steps, cfg.train.early_stopping_patience)
    if steps < trainer.args.max_steps:  # the Trainer looks at max_steps after a step only; without rows left it takes none
        trainer.args.max_steps = steps
        trainer.train_dataset = trainer.train_dataset.select(range(steps * cfg.train.batch_size))
    trainer.train(resume_from_checkpoint=str(save) if save else None)


def forget(folder: Path) -> None:
    """Remove the saves of a published run; called on every rank."""
    wait_for_everyone()
    if rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
