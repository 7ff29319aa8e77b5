"""Rehearsal: rows of general text in every optimizer step of SFT, with a loss of their own, so that less is forgotten.

Mixing what was learned before into what is learned now is experience replay (Rolnick et al. 2019, arXiv:1811.11682); PPO's relative is stages/ppo/ptx.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from blake3 import blake3

from configs.errors import UserError
from configs.schema import SFTStage, Source
from stages import data
from stages.data.files import read_records, suffix_of
from stages.evaluation.likelihood import SEPARATOR
from stages.nodes.once import once_per_node
from stages.tokens import ModelTokens
from stages.training.labels import IGNORED, labelled
from stages.training.ranks import say

GENERAL = "general"  # the column of a row, and the [B, T] mask of a batch: True where a token is of a general row
SHORTEST = 8  # tokens: what is left of a document beyond whole rows is a row of its own from here on

Rows = list[dict[str, Any]]


class General(NamedTuple):
    """Labelled rows of general text, their share of an optimizer step's rows, the weight of their loss, and what the manifest says. No rows: nothing is mixed in."""

    rows: Rows
    share: float
    weight: float
    facts: dict[str, Any]

    def after(self, task: Rows, *, packed: bool = False) -> Rows:
        """All rows of a run: the task's, then these, each marked as what it is; the task's alone, unmarked, where there are none of these.

        `packed`: the task's rows are sequences of several rows, whose lengths they say; each of these is a sequence of its own.
        """
        own = [row | {"seq_lengths": [len(row["input_ids"])]} for row in self.rows] if packed else self.rows
        return [row | {GENERAL: False} for row in task] + [row | {GENERAL: True} for row in own] if own else task


def load(cfg: SFTStage, tokens: ModelTokens, limit: int) -> General:
    """The rows of `train.rehearsal`, tokenised.

    Raises:
        UserError: unreadable data, none left, or settings that do not go together.
    """
    wanted = cfg.train.rehearsal
    if wanted is None:
        return General([], 0.0, 0.0, {})
    if cfg.train.label_smoothing:
        raise UserError("train.rehearsal gives general rows a weight of their own, which train.label_smoothing does not know: leave out one of them")
    rows = once_per_node("reading train.rehearsal.data", lambda: _read(cfg, tokens, limit), node_0_first=True)
    if not rows:
        raise UserError("train.rehearsal.data holds no row that can be trained on; give more text, or raise max_length")
    count = sum(len(row["input_ids"]) for row in rows)
    say(f"rehearsal: {len(rows)} rows of general text, {count} tokens")
    digest = blake3(repr([(row["input_ids"], row["labels"]) for row in rows]).encode()).hexdigest()
    return General(rows, wanted.share, wanted.weight, {"fingerprint": digest, "rows": len(rows), "tokens": count})


def _read(cfg: SFTStage, tokens: ModelTokens, limit: int) -> Rows:
    wanted = cfg.train.rehearsal
    assert wanted is not None
    texts = [source for source in wanted.data if is_text(source)]
    others = [source for source in wanted.data if not is_text(source)]
    rows: Rows = []
    for source in texts:
        for document in documents(source):
            rows += [{"input_ids": ids, "labels": ids} for ids in cut(encoded(document, tokens.tokenizer), min(wanted.tokens or limit, limit))]
    if others:
        kept = data.Splitter(cfg.split).split(data.read_demonstrations(others).rows).train
        demonstrations, _ = data.encode_demonstrations(tokens.formatter, kept, limit, cfg.overlong, cfg.loss_on)
        rows += [labelled(row) for row in demonstrations]
    return rows


def is_text(source: Source) -> bool:
    """Whether a source is plain text: asked for, or a .txt file."""
    return source.format == "text" or (source.format == "auto" and not source.path.startswith("hf:") and suffix_of(Path(source.path)) == ".txt")


def documents(source: Source) -> list[str]:
    """Texts of a source: a .txt file's parts between <|endoftext|>, or the column `text` of each row.

    Raises:
        UserError: a file that can't be read, a row without text, or a weight, which plain text has none of.
    """
    if source.weight != 1:
        raise UserError(f"{source.path}: plain text has no `weight`; set train.rehearsal.share and train.rehearsal.weight")
    problems: list[str] = []
    records = list(read_records(source, problems))
    problems += [f"{record.where}: has no text in a column `text`" for record in records if not isinstance(record.fields.get("text"), str)]
    if problems:
        raise UserError(f"{len(problems)} bad rows of general text, the first: {problems[0]}")
    found = [record.fields["text"] for record in records]
    if source.path.lower().endswith((".txt", ".txt.gz")):
        found = "\n".join(found).split(SEPARATOR)
    return [text for text in found if text.strip()]


def encoded(text: str, tokenizer: Any) -> list[int]:
    """Ids of a document, which begins with BOS where the tokenizer has one."""
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return [*start, *tokenizer(text.strip(), add_special_tokens=False, verbose=False)["input_ids"]]


def cut(ids: Sequence[int], width: int) -> list[list[int]]:
    """Ids in rows of `width`; what is left at the end is a row where it has SHORTEST tokens, or is all there is."""
    rows = [list(ids[start : start + width]) for start in range(0, len(ids), width)]
    return [row for row in rows if len(row) >= min(SHORTEST, width)] or [row for row in rows[:1] if len(row) > 1]


# -- training


class Marked:
    """A collator that hands on which tokens are of general rows, as GENERAL [B, T]."""

    def __init__(self, collate: Any) -> None:
        self.collate = collate

    def __call__(self, rows: Rows) -> dict[str, torch.Tensor]:
        """A batch; rows without marks (of an evaluation) give one without marks."""
        batch = self.collate([{key: value for key, value in row.items() if key != GENERAL} for row in rows])
        if GENERAL in rows[0]:
            marks = [torch.full((len(row["input_ids"]),), bool(row[GENERAL])) for row in rows]
            marks = marks if len(batch["labels"]) == len(rows) else [torch.cat(marks)]  # packed: all rows in one sequence
            width = batch["labels"].shape[1]
            batch[GENERAL] = torch.stack([F.pad(mark, (0, width - len(mark))) for mark in marks])
        return batch


def token_weights(general: torch.Tensor, counts: torch.Tensor, weight: float) -> torch.Tensor:
    """What each token's loss is multiplied by, shaped as the mask `general`, so that the mean over all tokens of an optimizer step is
    the task's mean plus `weight` times the general rows' mean. `counts` [2]: the step's task and general tokens, over all ranks.
    """
    task, others = counts.double().clamp(min=1)
    total = counts.double().sum()
    return torch.where(general, weight * total / others, total / task).float()


class Weighing:
    """A model whose log-probs come out weighted, as seen by a trainer's `compute_loss`; `sums` [2] keeps the unweighted losses of both kinds."""

    def __init__(self, model: Any, general: torch.Tensor, labels: torch.Tensor, counts: torch.Tensor, weight: float) -> None:
        self.model = model
        self.general, self.counted = general[:, 1:], labels[:, 1:] != IGNORED
        self.weights = token_weights(self.general, counts, weight)
        self.sums = torch.zeros(2, dtype=torch.float64, device=labels.device)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        outputs = self.model(*args, **kwargs)
        before = outputs.log_probs.shape[1] - self.weights.shape[1]  # positions of a soft prompt, which count nothing
        own = outputs.log_probs.detach()[:, before:].double()
        self.sums = torch.stack([-(own * (self.counted & kind)).sum() for kind in (~self.general, self.general)])
        outputs.log_probs = outputs.log_probs * F.pad(self.weights, (before, 0), value=1.0)
        return outputs


def mixing(trainer_class: Any, general: General) -> Any:
    """A subclass of TRL's SFTTrainer whose loss weighs general rows apart, and which logs both losses: `task_loss` and `rehearsal_loss`.

    The class itself where nothing is mixed in.
    """
    if not general.rows:
        return trainer_class

    class Mixing(trainer_class):
        counts: torch.Tensor  # [2]: task and general tokens of this optimizer step, over all ranks
        sums: torch.Tensor | None = None  # [2]: their losses so far in this optimizer step, of this rank

        data_collator: Any

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.data_collator = Marked(self.data_collator)

        def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
            batches, items = super().get_batch_samples(*args, **kwargs)
            found = torch.zeros(2, dtype=torch.float64, device=self.args.device)
            for batch in batches:
                marks, counted = batch[GENERAL][:, 1:].to(found.device), batch["labels"][:, 1:].to(found.device) != IGNORED
                found += torch.stack([(counted & kind).sum() for kind in (~marks, marks)])
            self.counts = self.accelerator.reduce(found, "sum")
            return batches, items

        def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            marks = inputs.pop(GENERAL, None)
            if marks is None:
                return super().compute_loss(model, inputs, *args, **kwargs)
            seen = Weighing(model, marks, inputs["labels"], self.counts, general.weight)
            loss = super().compute_loss(seen, inputs, *args, **kwargs)
            self.sums = seen.sums if self.sums is None else self.sums + seen.sums
            if self.accelerator.sync_gradients:
                means = (self.accelerator.reduce(self.sums, "sum") / self.counts.clamp(min=1)).tolist()
                self.sums = None
                for name, value in zip(("task_loss", "rehearsal_loss"), means, strict=True):
                    self._metrics["train"][name].append(value)
            return loss

    return Mixing
