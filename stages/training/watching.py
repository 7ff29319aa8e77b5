"""Watches an SFT run: looks at what it forgets, examines everything that is logged, and warns or stops where a health check begins to fail."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from configs.schema import SFTStage
from stages import data
from stages.data import duplicates
from stages.health.findings import Finding, counts, refusal, saved_words
from stages.nodes.once import once_per_node
from stages.tokens import ModelTokens
from stages.training import health
from stages.training.forgetting import Forgetting
from stages.training.plan import Plan
from stages.training.ranks import from_rank_0, say


def watcher(cfg: SFTStage, tokens: ModelTokens, limit: int, plan: Plan, splits: data.Splits, dropped: int) -> Callable[[Any], Watching] | None:
    """What gives a trainer its `Watching`, or None where `health.action` is off. `dropped`: training rows that are too long. Every rank calls it.

    Raises:
        UserError: a file under `health` that can't be read.
    """
    if cfg.health.action == "off":
        return None
    facts = data_facts(splits, dropped)
    looks = cfg.health.plain_text is not None or cfg.health.general_prompts is not None
    course = health.Course(cfg.health, plan.warmup_steps)
    return lambda trainer: Watching(trainer, course, plan, facts, Forgetting(trainer, cfg, tokens, limit) if looks else None)


def data_facts(splits: data.Splits, dropped: int) -> dict[str, float]:
    """What is known of the data before the first step: the share of training rows that are too long, and of validation rows that repeat one."""
    facts = {health.DROPPED: dropped / max(1, len(splits.train))}
    if splits.validation:
        found = once_per_node("looking for validation rows among the training rows", lambda: duplicates.find(splits.train, splits.validation))
        count = len(found.exact) + len(found.near or [])
        facts[health.DUPLICATES] = count / len(splits.validation)
        near = f"{len(found.near)} nearly" if found.near is not None else "near ones are looked for with align-stack[duplicates]"
        if count or found.near is None:
            say(f"data: {count} of {len(splits.validation)} validation rows repeat a training row ({len(found.exact)} word for word, {near})")
    return facts


def outcome(trainer: Any) -> dict[str, Any]:
    """What a trainer's `Watching` has found, for the manifest; {} without one. A collective."""
    found = [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, Watching)]
    return found[0].outcome() if found else {}


class Watching(TrainerCallback, ExportableState):
    """To stand before the callback that writes logs down, which then writes what was found as well.

    Findings are a function of the Trainer's log history, which every save holds and every rank has alike. `facts` is what is known of the data
    (health.DROPPED, health.DUPLICATES).
    """

    def __init__(self, trainer: Any, course: health.Course, plan: Plan, facts: dict[str, float], forgetting: Forgetting | None) -> None:
        self.trainer, self.course, self.plan, self.facts, self.forgetting = trainer, course, plan, facts, forgetting
        self.begun = False
        self.failed: list[Finding] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Go on from what the save remembers."""
        self.begun = state.global_step > 0 and self.forgetting is None
        saved = (state.stateful_callbacks or {}).get(type(self).__name__)
        if saved and self.forgetting is not None and state.global_step:
            self.begun = self.forgetting.load(saved["attributes"])
        state.stateful_callbacks[type(self).__name__] = self.state()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before the first step: what is known of the data, and the starting model."""
        if not self.begun:
            self.begun = True
            self._log((self.facts if not state.global_step else {}) | (self.forgetting.start() if self.forgetting is not None else {}), control)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at what is forgotten whenever an evaluation is due, and after the last step."""
        if self.forgetting is not None and (state.global_step % self.plan.eval_every == 0 or state.global_step == state.max_steps):
            self._log(self.forgetting.look(), control)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Examine the newest line of the history, and mark in it what has failed.

        Raises:
            UserError: a check is to stop the run and has failed before the first step.
        """
        *before, line = state.log_history
        marked, started = health.judged(line, before, self.course)
        found = {key: value for key, value in marked.items() if key not in line}
        line.update(found)
        if logs is not None:
            logs.update(found)
        for finding in started:
            say(f"warning: {finding}")
        if self.course.limits.action == "stop" and (agreed := from_rank_0("health checks", lambda: list(started))):
            self.failed += agreed
            if not state.global_step:
                raise refusal(self.failed, "Nothing was trained")
            control.should_save = control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Where a check is to stop the run and has failed, this save is what it stops for.

        Raises:
            UserError: naming each of them.
        """
        if self.failed:
            raise refusal(self.failed, saved_words(self.trainer.saved == f"checkpoint-{state.global_step}"))

    on_train_end = on_save

    def outcome(self) -> dict[str, Any]:
        """For the manifest: how often each check failed, and what the published model has forgotten. A collective."""
        history = self.trainer.state.log_history
        out: dict[str, Any] = {"health": counts(history)}
        if self.forgetting is not None:
            start: dict[str, float] = next((line for line in reversed(history) if health.START in line), {})
            before = {"forgetting/perplexity_at_start": start[health.PERPLEXITY]} if health.PERPLEXITY in start else {}
            out["forgetting"] = {key.removeprefix("forgetting/"): value for key, value in (before | self.forgetting.look()).items()}
        return out

    def state(self) -> dict[str, Any]:
        """What stands in every save's trainer_state.json."""
        attributes = self.forgetting.state() if self.forgetting is not None else {}
        return {"args": {}, "attributes": json.loads(json.dumps(attributes))}

    def _log(self, line: dict[str, float], control: Any) -> None:
        """Log a line of its own; the training log that may be due at this step stays due."""
        if line:
            asked, was_training = control.should_log, self.trainer.model.training
            self.trainer.model.eval()  # TRL adds its unlogged training metrics to a log made in training mode
            self.trainer.log(line)
            self.trainer.model.train(was_training)
            control.should_log = asked
