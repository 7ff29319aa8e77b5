"""How an interrupted run goes on: from the newest save that verifies, unless what it was made from has changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from configs.allowed import fields_of
from configs.errors import UserError
from configs.schema import StageConfig, TRLStage
from stages.nodes import agree
from stages.training import pickles, saves
from stages.training.changes import changes, identity, refusal, refused
from stages.training.ranks import from_rank_0, say
from stages.training.save_names import IDENTITY
from stages.training.saves import SEAL, forget
from stages.training.stopping import Rule, rule_of, stopped_early
from stages.zero.shards import data_only

__all__ = ["choose_save", "forget", "identity", "train"]


def choose_save(folder: Path, cfg: StageConfig, now: dict[str, Any]) -> Path | None:
    """The newest save that verifies, or None to start anew; newer ones that do not verify are named and put aside.

    Rank 0 looks and decides, and every process is told: on a file system that caches, they might see different files. `now` is the run's
    `identity`; what a save was made from stands in its seal, so that a resume that is refused here or later has changed nothing.

    Raises:
        UserError: on every process: the save was made from other data, tokenizer, template, schedule, number of processes or config.
    """
    name, content = from_rank_0("looking for a save to continue from", lambda: _choose(folder, cfg, now))
    if name is None:
        return None
    if not agree.appears(folder / name / SEAL, content):
        raise UserError(f"{folder / name} is not there as rank 0 sees it; output must be a folder that all nodes share, under the same path")
    say(f"resume: continuing from {name}")
    return folder / name


def _choose(folder: Path, cfg: StageConfig, now: dict[str, Any]) -> tuple[str | None, str]:
    """The name of the save and its seal's text (rank 0)."""
    saves.settle_all(folder)
    skipped: list[tuple[Path, str]] = []
    chosen = None
    for save in saves.saves(folder):
        why = saves.problem(save)
        if why is None:
            chosen = save
            break
        skipped.append((save, why))
    if chosen is not None:
        refuse_changed(chosen, cfg, now)
    saves.remove_left_overs(folder)
    for save, why in skipped:
        aside = saves.set_aside(save)
        say(f"resume: {save.name} is ignored and put aside as {aside.name}: {why}")
    if chosen is None:
        if skipped:
            say(f"warning: none of the {len(skipped)} save(s) in {folder} is whole; the run starts anew, and they are kept until it has got past them")
        return None, ""
    return chosen.name, (chosen / SEAL).read_text(encoding="utf-8")


def refuse_changed(save: Path, cfg: StageConfig, now: dict[str, Any]) -> None:
    """Raise UserError where what a save was made from has changed and that is not allowed; say what is allowed to have."""
    found = changes(depends_on(save), now)
    if bad := refused(found, cfg.allow_changed):
        raise UserError(refusal(save.parent, save.name, bad, fields_of(type(cfg))))
    for change in found:
        say(f"resume: allowed to have changed: {change}")
        if change.field == "processes":
            say("resume: every step has the same rows as before; dropout is drawn anew from seed, step and rank, so the result is another than that of an unchanged run")


def depends_on(save: Path) -> dict[str, Any]:
    """What a verified save was made from."""
    found = saves.read_seal(save)["depends_on"]
    recorded = save.parent / IDENTITY
    if found or not recorded.exists():
        return found
    before = json.loads(recorded.read_text(encoding="utf-8"))  # of a version whose seals did not say so
    return {key: before[key] for key in ("data", "processes", "zero_stage") if key in before}


def steps_to_train(save: Path | None, planned: int, rule: Rule | None) -> int:
    """The step to stop at: the plan's, or the save's own when that run had already stopped early."""
    if save is None:
        return planned
    state = json.loads((save / "trainer_state.json").read_text())
    return int(state["global_step"]) if stopped_early(state["log_history"], rule) else planned


def train(trainer: Any, cfg: TRLStage, now: dict[str, Any]) -> None:
    """Train, from the newest sound save of an interrupted run where there is one; `now` is the run's `identity`.

    Raises:
        UserError: the saves were made from other inputs or under another ZeRO stage, or the loss is not finite.
    """
    trainer.depends_on = now | {"steps": trainer.args.max_steps}
    save = choose_save(Path(trainer.args.output_dir), cfg, trainer.depends_on)
    if save is not None:
        pickles.check(save)
    steps = steps_to_train(save, trainer.args.max_steps, rule_of(cfg))
    if steps < trainer.args.max_steps:  # the Trainer looks at max_steps after a step only; without rows left it takes none
        trainer.args.max_steps = steps
        trainer.train_dataset = trainer.train_dataset.select(range(steps * cfg.train.batch_size))
    if save is not None:
        trainer.saved, trainer.stepped = save.name, False
    with data_only():
        trainer.train(resume_from_checkpoint=str(save) if save else None)
