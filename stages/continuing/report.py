"""What got better and worse by training on: old and new held-out rows and plain text, measured before the first step and after the last."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from configs.errors import UserError
from configs.schema import SFTStage
from configs.schema.common import Source
from configs.schema.continued import OldData
from stages import data
from stages.compat import token_statistics
from stages.continuing import metrics
from stages.continuing.figures import Sums, compare
from stages.continuing.metrics import Answers, Asked
from stages.continuing.table import lines
from stages.evaluation.likelihood import text_rows
from stages.nodes.once import once_per_node
from stages.tokens import ModelTokens
from stages.training import watchdog
from stages.training.ranks import from_rank_0, say
from stages.zero import gather

Encoded = dict[str, Any]


@dataclass(frozen=True)
class Held:
    """Rows that nothing was trained on. groups: the prompt (or text: `unit`) of each. note: what a reader must know of them. asked: what evaluation.metrics asks."""

    name: str
    rows: list[Encoded]
    groups: list[int]
    note: str = ""
    unit: str = "prompt"
    asked: Asked | None = None


@dataclass
class Report:
    """What is measured, and what was found before training. repeated: new rows whose prompts earlier data held out, by part."""

    held: list[Held]
    notes: list[str]
    repeated: dict[str, int]
    before: list[Sums]
    answers: list[Answers | None] = field(default_factory=list)


def prepare(cfg: SFTStage, tokens: ModelTokens, new: data.Splits[data.Demonstration], limit: int, positions: int | None) -> Report | None:
    """The rows to measure on; None where nothing is trained on from. Every rank calls this. `positions`: tokens that the model reads (None: any number).

    Raises:
        UserError: a plain text that can't be read.
    """
    if cfg.continued is None:
        return None
    report = once_per_node("reading what was trained on before", lambda: _prepare(cfg, tokens, new, limit, positions))
    for place, held in enumerate(report.held[1:], start=1):  # the run's own evaluations try out the new data
        if held.asked is not None:
            asked, why = metrics.without_own(cfg, tokens, held.asked)
            report.held[place] = replace(held, asked=asked)
            report.notes += [f"{held.name}: not measured by functions of yours: {why}"] if why else []
    for note in report.notes:
        say(f"continue: {note}")
    return report


def _prepare(cfg: SFTStage, tokens: ModelTokens, new: data.Splits[data.Demonstration], limit: int, positions: int | None) -> Report:
    assert cfg.continued is not None
    report = Report([], [], {"test": 0, "validation": 0}, [])
    _add(report, cfg, tokens, limit, "new data", new.validation, "")
    _ask(report, cfg, tokens, new, cfg.data, limit, positions)
    every = [*new.train, *new.validation, *new.test]
    for old in cfg.continued.old:
        parts = _old_parts(report, cfg, old)
        if parts is not None:
            changed = "" if old.validation in (None, data.fingerprint(parts.validation)) else "these files have changed since it was trained"
            if _add(report, cfg, tokens, limit, f"data of {old.of}", parts.validation, changed):
                _ask(report, cfg, tokens, parts, old.data, limit, positions)
            _count_repeated(report, old.of, every, parts)
    if cfg.continued.plain_text is not None:
        found, texts = text_rows(tokens.tokenizer, cfg.continued.plain_text, limit)
        report.held.append(Held("plain text", found, texts, unit="text"))
    return report


def _add(report: Report, cfg: SFTStage, tokens: ModelTokens, limit: int, name: str, rows: Sequence[data.Demonstration], note: str) -> bool:
    """Encode rows as the run does; those that are too long are left out, as in training. Whether there are any."""
    kept, groups, known = list[Encoded](), list[int](), dict[str, int]()
    for row in rows:
        encoded, _ = data.encode_demonstrations(tokens.formatter, [row], limit, "drop", cfg.loss_on, may_be_empty=True)
        if encoded:
            kept += encoded
            groups.append(known.setdefault(data.group_key(row.prompt), len(known)))
    if kept:
        report.held.append(Held(name, kept, groups, note))
    else:
        report.notes.append(f"{name}: has no validation rows (split.validation is {cfg.split.validation}), so it is not compared")
    return bool(kept)


def _ask(report: Report, cfg: SFTStage, tokens: ModelTokens, parts: data.Splits[data.Demonstration], sources: Sequence[Source], limit: int, positions: int | None) -> None:
    """What evaluation.metrics asks of the rows that were added last."""
    if not cfg.evaluation.metrics or not report.held or not parts.validation:
        return
    held = report.held[-1]
    asked, why = metrics.ask(cfg, tokens, parts, sources, limit, positions)
    report.held[-1] = replace(held, asked=asked)
    report.notes += [f"{held.name}: accuracy is not measured: {why}"] if why else []


def _old_parts(report: Report, cfg: SFTStage, old: OldData) -> data.Splits[data.Demonstration] | None:
    """The parts of earlier data as it is now; None, and a note, where it can't be read any more."""
    try:
        return data.Splitter(cfg.split).split(data.read_demonstrations(old.data).rows, need_train=False)
    except UserError as error:
        report.notes.append(f"the data of {old.of} can't be read any more, so what was forgotten of it is not measured: {str(error).splitlines()[0]}")
        return None


def _count_repeated(report: Report, of: str, rows: Sequence[data.Demonstration], old: data.Splits[data.Demonstration]) -> None:
    """Note how many new rows have prompts that earlier data held out: the split keeps them out of training again."""
    for part in ("test", "validation"):
        prompts = {data.group_key(row.prompt) for row in getattr(old, part)}
        if count := sum(data.group_key(row.prompt) in prompts for row in rows):
            report.repeated[part] += count
            report.notes.append(f"warning: {count} of {len(rows)} new rows repeat prompts that {of} held out for {part}; the same split keeps them out of training, in {part}")


def measure_before(report: Report | None, trainer: Any, cfg: SFTStage, tokens: ModelTokens) -> None:
    """Measure what the run starts from; to be called before it trains. An interrupted run does it again and finds the same. Every rank calls this."""
    if report is None:
        return
    model, device = trainer.model, trainer.accelerator.device
    if not any(map(gather.is_split, model.parameters())) and next(model.parameters()).device != device:
        model.to(device)  # where DeepSpeed's engine, which there is only in training, will have it
    with gather.forward_possible(model):
        report.before = [row_sums(trainer, model, held.rows) for held in report.held]
        predicted = [metrics.tell_apart(trainer, tokens, held.asked) if held.asked else [] for held in report.held]
    report.answers = _answers(report, trainer, cfg, tokens, predicted)  # these want the weights whole, not gathered module by module


def _answers(report: Report, trainer: Any, cfg: SFTStage, tokens: ModelTokens, predicted: list[list[int]]) -> list[Answers | None]:
    asked = [held.asked for held in report.held]
    return [Answers(metrics.complete_all(trainer, tokens, cfg.evaluation, one), labels) if one else None for one, labels in zip(asked, predicted, strict=True)]


def finish(report: Report | None, trainer: Any, cfg: SFTStage, tokens: ModelTokens) -> dict[str, Any]:
    """What got better and worse, for the manifest ({} where nothing is trained on from), and as a table in the log. Every rank calls this."""
    if report is None or cfg.continued is None:
        return {}
    model = trainer.model_wrapped if trainer.is_deepspeed_enabled else trainer.model
    sets = []
    predicted = [metrics.tell_apart(trainer, tokens, held.asked) if held.asked else [] for held in report.held]
    answers = _answers(report, trainer, cfg, tokens, predicted)
    for held, before, was, now in zip(report.held, report.before, report.answers, answers, strict=True):
        found = compare(before, row_sums(trainer, model, held.rows), held.groups, seed=cfg.seed, unit=held.unit)
        further = _further(report, held, cfg, tokens, was, now)
        sets.append({"name": held.name, **found} | ({"metrics": further} if further else {}) | ({"note": held.note} if held.note else {}))
    record = {"of": cfg.init_from, "adapter": cfg.continued.adapter, "sets": sets, "notes": report.notes, "repeated": report.repeated}
    for line in lines(record):
        say(line)
    return {"continued": record}


def _further(report: Report, held: Held, cfg: SFTStage, tokens: ModelTokens, was: Answers | None, now: Answers | None) -> dict[str, Any]:
    """evaluation.metrics before and after; a function of the user's that fails here costs the figures and a note, not the trained model."""
    if held.asked is None or was is None or now is None:
        return {}
    asked = held.asked
    try:
        return dict(from_rank_0("comparing completions", lambda: metrics.compared(cfg, tokens, asked, was, now)))
    except UserError as error:
        report.notes.append(f"{held.name}: evaluation.metrics could not be compared: {str(error).splitlines()[0]}")
        return {}


@torch.no_grad()
def row_sums(trainer: Any, model: Any, rows: Sequence[Encoded]) -> Sums:
    """Sums of each row, the same on every rank. Rows are taken by length; every rank makes the same number of forward passes."""
    accelerator, size = trainer.accelerator, trainer.args.per_device_eval_batch_size
    was_training, pad_id = model.training, trainer.processing_class.pad_token_id
    model.eval()
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]["input_ids"]))
    totals = torch.zeros(len(rows), 3, dtype=torch.float64, device=accelerator.device)
    stride = size * accelerator.num_processes
    with watchdog.during("eval"):
        for start in range(0, len(rows), stride):
            first = start + accelerator.process_index * size
            mine = order[first : first + size]
            batch, labels = _padded([rows[index] for index in mine or order[:1]], pad_id, accelerator.device)
            watchdog.beat()
            with accelerator.autocast():
                found = token_statistics(model, batch, labels)
            sums = torch.stack([-found.logprobs.double().sum(1), found.correct.double().sum(1), found.counted.double().sum(1)], dim=1)
            if mine:
                totals[mine] = sums
    model.train(was_training)
    loss, correct, counted = accelerator.reduce(totals, "sum").cpu().numpy().T
    return Sums(np.ascontiguousarray(loss), np.ascontiguousarray(correct), np.ascontiguousarray(counted))


def _padded(rows: Sequence[Encoded], pad_id: int, device: torch.device) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A right-padded batch and its labels, all [B, T]; labels are -100 where nothing counts."""
    width = max(len(row["input_ids"]) for row in rows)
    ids = torch.full((len(rows), width), pad_id)
    labels, mask = torch.full((len(rows), width), -100), torch.zeros((len(rows), width), dtype=torch.long)
    for place, row in enumerate(rows):
        tokens, counts = torch.tensor(row["input_ids"]), torch.tensor(row["completion_mask"], dtype=torch.bool)
        ids[place, : len(tokens)], mask[place, : len(tokens)] = tokens, 1
        labels[place, : len(tokens)] = torch.where(counts, tokens, -100)
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}, labels.to(device)
