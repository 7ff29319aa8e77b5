"""What an SFT run measures on held-out rows beside loss and token accuracy: made ready before the training, and called at every evaluation."""

from __future__ import annotations

import difflib
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from blake3 import blake3

from configs.errors import UserError
from configs.extras import need
from configs.schema import SFTStage
from configs.schema.common import Source
from configs.schema.validation import MEASURED, PREFIX, WITHOUT_COMPLETIONS, Validation
from rewards.python import source_digest
from stages import soft
from stages.data import Demonstration, Splits
from stages.nodes.once import once_per_node
from stages.tokens import ModelTokens
from stages.training.ranks import from_rank_0, say
from stages.validation.completions import complete
from stages.validation.labels import Choice, choices, classify, labels_of
from stages.validation.own import OwnMetric
from stages.validation.rows import Question, columns_of, drawn, with_columns
from stages.validation.text_metrics import COMPARE, EXTRA, PACKAGES

SECONDS = "seconds"  # spent on all of this at one evaluation


@dataclass(frozen=True)
class Part:
    """What is asked of the validation part, or of the test part."""

    questions: list[Question]  # to be completed
    choices: list[Choice]  # to be told apart by labels


def prepare(cfg: SFTStage, tokens: ModelTokens, splits: Splits[Demonstration], model: Any, *, limit: int, eval_every: int) -> HeldOut:
    """Everything that evaluations need, tried out before anything is trained. `limit`: tokens of a row; `eval_every`: optimizer steps.

    Raises:
        UserError: on every process: a package that is missing, no rows to measure, labels that are none, a function that can't be
            loaded or fails on the rows' own completions, a metric to choose by that nothing measures.
    """
    asked = cfg.evaluation
    for name in asked.metrics:
        if isinstance(name, str) and name in PACKAGES:
            need(PACKAGES[name], f"evaluation.metrics: {name}", EXTRA)
    if asked.metrics and not splits.validation:
        raise UserError("evaluation.metrics needs validation rows, and there are none: raise split.validation, or leave the metrics out")
    labels = labels_of(asked.labels, splits.train) if WITHOUT_COMPLETIONS in asked.metrics else []
    positions = soft.room(model)

    def part(rows: Sequence[Demonstration]) -> Part:
        asks = choices(tokens.formatter, rows, labels, limit, strict=asked.labels is not None) if labels else []
        return Part(questions_of(cfg, tokens, rows, limit, positions), asks)

    validation, test = once_per_node("tokenising what is asked", lambda: (part(splits.validation), part(splits.test if asked.test else [])))
    if asked.generate is not None and not validation.questions:
        raise UserError(f"evaluation.generate.max_new_tokens {asked.generate.max_new_tokens}: no validation prompt leaves room for it within the model's {positions} positions; lower it")
    held_out = HeldOut(asked, tokens, labels, validation, test, eval_every)
    held_out.try_out()
    held_out.announce()
    return held_out


def questions_of(cfg: SFTStage, tokens: ModelTokens, rows: Sequence[Demonstration], limit: int, positions: int | None, sources: Sequence[Source] | None = None) -> list[Question]:
    """The rows that are completed: `evaluation.generate.rows` of them, none where it is off. `positions`: tokens that the model reads (None: any number);
    `sources`: where the rows are of (None: cfg.data)."""
    settings = cfg.evaluation.generate
    if settings is None:
        return []
    room = (positions or limit + settings.max_new_tokens) - settings.max_new_tokens
    found = drawn(rows, tokens.formatter, count=settings.rows, seed=cfg.seed, room=room)
    return with_columns(found, cfg.data if sources is None else sources) if cfg.evaluation.own else found


class HeldOut:
    """The further metrics of an SFT run; what a Trainer calls at every evaluation."""

    def __init__(self, asked: Validation, tokens: ModelTokens, labels: list[str], validation: Part, test: Part, eval_every: int) -> None:
        self.asked, self.tokens, self.labels, self.validation, self.test, self.eval_every = asked, tokens, labels, validation, test, eval_every

    @cached_property
    def own(self) -> list[OwnMetric]:
        """The user's functions; rank 0 alone loads and calls them."""
        return [OwnMetric(spec) for spec in self.asked.own]

    def __call__(self, trainer: Any, found: Mapping[str, float], *, final: bool = False) -> dict[str, float]:
        """What is added to the loss and token accuracy that an evaluation found. A collective."""
        began = time.monotonic()
        more = {"perplexity": perplexity(found["loss"])} | self.measured(trainer, self.validation, generate=final or self.due(trainer.state))
        return more | ({SECONDS: round(time.monotonic() - began, 3)} if self.asked.metrics and not final else {})

    def due(self, state: Any) -> bool:
        """Whether the evaluation after this step generates: every so many do, and the last."""
        every = self.asked.generate.every if self.asked.generate else 1
        return state.global_step // self.eval_every % every == 0 or state.global_step + self.eval_every > state.max_steps

    def measured(self, trainer: Any, part: Part, *, generate: bool = True) -> dict[str, float]:
        """Labels told apart, and completions compared where `generate` says so. A collective."""
        more = classify(trainer, part.choices, self.labels, self.tokens.pad_id) if part.choices else {}
        if self.asked.generate is None or not part.questions or not generate:
            return more
        written = complete(trainer, self.tokens, part.questions, self.asked.generate)
        return more | from_rank_0("comparing completions", lambda: self.compare(part.questions, written))

    def compare(self, questions: Sequence[Question], written: Sequence[str]) -> dict[str, float]:
        """Every metric of completions, in the config's order (on one process). Raises UserError where a function of the user's fails."""
        references, prompts, columns = [asked.reference for asked in questions], [asked.prompt for asked in questions], columns_of(questions)
        more: dict[str, float] = {}
        for name in self.asked.metrics:
            if isinstance(name, str) and name in COMPARE:
                more |= COMPARE[name](written, references)
        for metric in self.own:
            found = metric(prompts, written, references, columns)
            if twice := sorted(set(found) & set(more)):
                raise UserError(f"{metric.function.called}: names a metric {twice[0]!r}, and so does another function; give one of them another name")
            more |= found
        return more

    def try_out(self) -> None:
        """Call the user's functions on the rows' own completions, and look for the metric that the published state is chosen by.

        Raises:
            UserError: on every process.
        """
        if not self.asked.own:
            return
        questions = self.validation.questions

        def names() -> list[str]:
            perfect = self.compare(questions, [asked.reference for asked in questions])
            return [*(name for metric in self.asked.metrics if isinstance(metric, str) for name in MEASURED[metric]), *perfect, "loss", "perplexity", "token_accuracy"]

        there = from_rank_0("trying out evaluation.metrics", names)
        wanted = (self.asked.chosen_by or PREFIX + "loss").removeprefix(PREFIX)
        if wanted not in there:
            close = difflib.get_close_matches(wanted, there, n=1, cutoff=0.5)
            hint = f". Did you mean {PREFIX + close[0]!r}?" if close else ""
            raise UserError(f"evaluation.metric: {self.asked.metric!r} is not measured; what is measured: {', '.join(PREFIX + name for name in sorted(set(there)))}{hint}")

    def settings(self, part: Part) -> str:
        """What numbers of `measured` depend on beside the model: 16 hex digits. Numbers with other digits can't be compared."""
        own = [spec.model_dump(mode="json") | {"source": source_digest(spec.function)} for spec in self.asked.own]
        tokens = self.asked.generate.max_new_tokens if self.asked.generate else None
        content = {"questions": [(asked.prompt, asked.reference, *([asked.columns] if asked.columns else [])) for asked in part.questions], "max_new_tokens": tokens, "own": own, "labels": self.labels, "choices": [row[:1] + row[2:] for row in part.choices]}
        return blake3(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def announce(self) -> None:
        """Say what evaluations will measure."""
        told = [f"{len(self.validation.choices)} rows told apart by {len(self.labels)} labels"] if self.validation.choices else []
        told += [f"{len(self.validation.questions)} validation rows completed"] if self.validation.questions else []
        if told:
            say(f"evaluation: {', '.join(told)}")


def perplexity(loss: float) -> float:
    """exp(loss) of a loss in nats per token; infinite where that is beyond a float."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
