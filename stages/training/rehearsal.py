"""Rehearsal: rows of general text in every optimizer step of SFT, with a loss of their own, so that less is forgotten.

Mixing what was learned before into what is learned now is experience replay (Rolnick et al. 2019, arXiv:1811.11682); PPO's relative is stages/ppo/ptx.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from blake3 import blake3

from configs.errors import UserError
from configs.schema import SFTStage, Source
from stages import data
from stages.data.files import read_records, suffix_of
from stages.evaluation.likelihood import SEPARATOR
from stages.loss.sums import TokenSums
from stages.loss.trainer import usual
from stages.nodes.once import once_per_node
from stages.tokens import ModelTokens
from stages.training.labels import IGNORED, labelled
from stages.training.ranks import say

GENERAL = "general"  # the column of a row, and the [B, T] mask of a batch: True where a token is of a general row
TASK, REHEARSAL = "task_loss", "rehearsal_loss"  # nats per token of an optimizer step
OF_TASK = ("mean_token_accuracy", "entropy")  # TRL's names of what is counted over the task's tokens
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

        `packed`: the task's rows are sequences of several rows, whose lengths they say; each of these is a sequence of its own. The first token of a row never counts.
        """
        own = [row | {"labels": [IGNORED, *row["labels"][1:]]} | ({"seq_lengths": [len(row["input_ids"])]} if packed else {}) for row in self.rows]
        return [row | {GENERAL: False} for row in task] + [row | {GENERAL: True} for row in own] if own else task


def load(cfg: SFTStage, tokens: ModelTokens, limit: int) -> General:
    """The rows of `train.rehearsal`, tokenised.

    Raises:
        UserError: unreadable data, none left, or settings that do not go together.
    """
    wanted = cfg.train.rehearsal
    if wanted is None:
        return General([], 0.0, 0.0, {})
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
    """A model as a trainer's `compute_loss` sees it: losses come out weighted, and what is counted for metrics is the task's.

    `sums` [2, 4]: loss in nats, tokens with the highest probability, entropy, tokens, of the task's tokens and of the general ones, without weights.
    """

    def __init__(self, model: Any, general: torch.Tensor, labels: torch.Tensor, counts: torch.Tensor, weight: float) -> None:
        self.model, self.general, self.labels = model, general, labels
        self.weights = token_weights(general, counts, weight)
        self.sums = torch.zeros(2, 4, dtype=torch.float64, device=labels.device)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.summed(*args, **kwargs) if kwargs.get("token_sums") else self.fused(*args, **kwargs)

    def summed(self, *args: Any, **kwargs: Any) -> TokenSums:
        """Sums of the loss in chunks (stages/loss)."""
        found = self.model(*args, token_weights=self.weights, marks=self.general, **kwargs)
        self.sums = found.apart
        return TokenSums(found.loss, *found.apart[0, 1:])

    def fused(self, *args: Any, **kwargs: Any) -> Any:
        """Outputs of TRL's own loss, [B, T - 1] log-probs among them."""
        outputs = self.model(*args, **kwargs)
        general, counted = self.general[:, 1:], self.labels[:, 1:] != IGNORED
        of_each = (-outputs.log_probs.detach(), outputs.is_top1, outputs.entropy.detach(), counted)
        self.sums = torch.stack([torch.stack([value.double()[counted & kind].sum() for value in of_each]) for kind in (~general, general)])
        outputs.log_probs = outputs.log_probs * self.weights[:, 1:]
        return outputs


def chunked(trainer: Any) -> bool:
    """Whether a trainer computes its loss in chunks (stages/loss/trainer.py); says why not where train.loss_chunk asks for it."""
    if not getattr(trainer, "token_sums", False):
        return False
    if not usual(trainer):
        why = "the model has a loss for its experts" if trainer.aux_loss_enabled else "rows are split over processes"
        say(f"rehearsal: {why}, so the loss is TRL's own and not computed in chunks, which takes memory")
    return bool(usual(trainer))


def mixing(trainer_class: Any, general: General, smoothing: float = 0.0) -> Any:
    """A subclass of TRL's SFTTrainer whose loss weighs general rows apart. It logs the task's loss as `loss`, theirs as `rehearsal_loss`, and as `objective`
    what is optimised, loss + weight * rehearsal_loss; token accuracy and entropy are the task's. The class itself where nothing is mixed in.

    `smoothing`: of labels, which the loss in chunks does by itself.
    """
    if not general.rows:
        return trainer_class

    class Mixing(trainer_class):
        counts: torch.Tensor  # [2]: task and general tokens of this optimizer step, over all ranks
        sums: torch.Tensor | None = None  # [2, 4]: as in Weighing, so far in this optimizer step, of this rank

        data_collator: Any

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.data_collator = Marked(self.data_collator)
            self.in_chunks = chunked(self)
            if smoothing and not self.in_chunks:
                raise UserError("train.rehearsal with train.label_smoothing needs the loss in chunks (train.loss_chunk: auto; not for a mixture of experts); leave out one of them")

        def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
            batches, items = super().get_batch_samples(*args, **kwargs)
            self.counts = self.accelerator.reduce(sum((counted(batch) for batch in batches), torch.zeros(2, dtype=torch.float64)).to(self.args.device), "sum")
            return batches, items

        def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            marks = inputs.pop(GENERAL, None)
            if marks is None:
                return super().compute_loss(model, inputs, *args, **kwargs)
            seen = Weighing(model, marks, inputs["labels"], self.counts, general.weight)
            loss = super().compute_loss(seen, inputs, *args, **kwargs)
            if not self.in_chunks:
                for name in OF_TASK:
                    self._metrics["train"][name].pop()  # of this micro-batch, task or not
            self.sums = seen.sums if self.sums is None else self.sums + seen.sums
            if self.accelerator.sync_gradients:
                keep(self._metrics["train"], self.accelerator.reduce(self.sums, "sum").tolist(), self.in_chunks)
                self.sums = None
            return loss

        def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            super().log(as_shown(logs, self._metrics["train"]), *args, **kwargs)

    return Mixing


def counted(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """How many of a batch's tokens the loss covers: [2], of the task and of general rows, on the CPU."""
    marks, covered = batch[GENERAL][:, 1:], batch["labels"][:, 1:] != IGNORED
    return torch.stack([(covered & kind).sum() for kind in (~marks, marks)]).double().cpu()


def keep(metrics: dict[str, list[float]], sums: Sequence[Sequence[float]], in_chunks: bool) -> None:
    """Add what an optimizer step was like to what the next log tells; `sums` as in Weighing, of all ranks. The loss in chunks keeps accuracy and entropy by itself."""
    (task, *others, tokens), (rehearsal, _, _, theirs) = sums
    found = {TASK: task / max(tokens, 1), REHEARSAL: rehearsal / max(theirs, 1)}
    if not in_chunks:
        found |= {name: value / max(tokens, 1) for name, value in zip(OF_TASK, others, strict=True)}
    for name, value in found.items():
        metrics[name].append(value)


def as_shown(logs: dict[str, float], metrics: dict[str, list[float]]) -> dict[str, float]:
    """A training log with the task's loss as its loss, which is what validation losses compare with; any other log as it is."""
    if "loss" in logs:
        task, rehearsal = (fmean(metrics.pop(name)) for name in (TASK, REHEARSAL))
        logs.update({"objective": logs["loss"], "loss": task, REHEARSAL: rehearsal})
    return logs
