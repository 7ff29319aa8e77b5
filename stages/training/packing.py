"""Packing: several rows in one sequence, only where the model provably keeps them apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from configs.errors import UserError
from stages.attention import is_flash
from stages.zero import gather

TOLERANCE = 1e-3  # nats, relative to 1 + |log-prob|; a leak moves log-probs by far more
NOISE = 0.1  # of what rows that see one another would change: in 16 bits the same numbers in another order differ by more than TOLERANCE
IGNORED = -100

# How a model is told where a row begins: by position ids that start again, of which transformers makes a mask; by a mask of ours; or by
# the lengths of rows in one flat sequence, for the kernels of flash attention.
Isolation = Literal["positions", "mask", "flat"]


def pack_rows(rows: list[dict[str, Any]], max_length: int) -> list[dict[str, Any]]:
    """Rows as packed sequences of at most `max_length` tokens with `seq_lengths`, best fit decreasing (TRL's `bfd`); no row is cut.

    The first token of a row never counts: what stands before it is another row.
    """
    from datasets import Dataset
    from trl import pack_dataset

    starts = [{"input_ids": row["input_ids"], "labels": [IGNORED, *row["labels"][1:]]} for row in rows]
    return pack_dataset(Dataset.from_list(starts), max_length, "bfd").to_list()


@dataclass(frozen=True)
class PackedRows:
    """Collates packed sequences, and rows that are not packed: [B, L], padded on the right, each row apart from the others and from padding."""

    pad_id: int
    mask_dtype: torch.dtype | None = None  # of an additive [B, 1, L, L] mask for models that do not read one from position ids

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """{"input_ids", "labels", "position_ids"[, "attention_mask"]}."""
        width = max(len(row["input_ids"]) for row in rows)
        ids = torch.full((len(rows), width), self.pad_id)
        labels = torch.full((len(rows), width), IGNORED)
        positions, documents = torch.zeros_like(ids), torch.zeros_like(ids)
        for number, row in enumerate(rows):
            real = len(row["input_ids"])
            ids[number, :real], labels[number, :real] = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])
            lengths = [*(row.get("seq_lengths") or [real]), width - real]  # padding is a row of its own, which none looks at
            positions[number] = torch.cat([torch.arange(length) for length in lengths])
            documents[number] = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        batch = {"input_ids": ids, "labels": labels, "position_ids": positions}
        if self.mask_dtype is not None:
            apart = documents.unsqueeze(2) != documents.unsqueeze(1)
            later = torch.ones(width, width, dtype=torch.bool).triu(1)
            mask = torch.zeros(apart.shape, dtype=self.mask_dtype).masked_fill_(apart | later, torch.finfo(self.mask_dtype).min)
            batch["attention_mask"] = mask.unsqueeze(1)
        return batch


def isolation(model: Any, rows: list[dict[str, Any]]) -> Isolation:
    """How this model keeps the rows of a sequence apart: proven by the log-probs of two rows, alone and in one sequence. A collective under ZeRO-3.

    Raises:
        UserError: one row sees the other whichever way it is told.
    """
    kernel = str(getattr(model.config, "_attn_implementation", "") or "")
    if is_flash(model):
        _on_gpu(model, kernel)
        ways: tuple[Isolation, ...] = ("flat",)
    else:
        ways = ("positions",) if _looks_back_in_part(model) else ("positions", "mask")
    if len(rows) < 2:
        return ways[0]
    pair = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in sorted(rows, key=lambda row: len(row["input_ids"]))[-2:]]
    precise = next(model.parameters()).dtype == torch.float32 and not is_flash(model)
    limit = TOLERANCE if precise else max(TOLERANCE, NOISE * _gap(model, pair, None))
    gaps = {}
    for way in ways:
        gaps[way] = _gap(model, pair, way)
        if gaps[way] <= limit:
            return way
    raise UserError(
        f"packing: with {type(model).__name__} and attention kernel {kernel or '?'}, rows in one sequence see one another "
        f"(log-probs differ by {min(gaps.values()):.2g}); set packing: false, or another attn_implementation"
    )


def collator(way: Isolation, model: Any, pad_id: int) -> PackedRows | None:
    """What makes batches so; None for flat ones, which are TRL's."""
    dtype = next(model.parameters()).dtype
    return None if way == "flat" else PackedRows(pad_id, dtype if way == "mask" else None)


def _on_gpu(model: Any, kernel: str) -> None:
    """Flash attention computes on a GPU only, so that is where it is tried."""
    if not torch.cuda.is_available():
        raise UserError(f"attn_implementation: {kernel} computes on a GPU, and there is none; leave it out, or set it to sdpa")
    model.to(torch.cuda.current_device())


def _looks_back_in_part(model: Any) -> bool:
    """Whether some layers see less than the whole row: a mask of ours would undo that."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    return bool(kinds or getattr(config, "sliding_window", None))


@torch.no_grad()
def _gap(model: Any, pair: list[dict[str, Any]], way: Isolation | None) -> float:
    """The largest difference between log-probs of two rows alone and in one sequence (`way` None: as one row), relative to 1 + |log-prob|."""
    together = {"input_ids": [t for row in pair for t in row["input_ids"]], "seq_lengths": [len(row["input_ids"]) for row in pair]}
    found = _logprobs(model, together | {"labels": together["input_ids"]}, way)
    gaps, start = [], 0
    for row in pair:
        alone, end = _logprobs(model, row, None), start + len(row["input_ids"])
        gaps.append(((found[start : end - 1] - alone).abs() / (1 + alone.abs())).max().item())
        start = end
    return max(gaps)


def _logprobs(model: Any, row: dict[str, Any], way: Isolation | None) -> torch.Tensor:
    """Log-probs of every next token of a sequence, [tokens - 1] nats; `way` None: it is one row."""
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    device = next(model.parameters()).device
    if way is None:
        batch: dict[str, Any] = {"input_ids": torch.tensor([row["input_ids"]])}
    elif way == "flat":
        batch = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)([row])
    else:
        made = collator(way, model, 0)
        assert made is not None
        batch = made([row])
    batch = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items() if key != "labels"}
    # flash kernels take 16 bits only, which training gives them by autocast too
    with gather.forward_possible(model), torch.autocast(device.type, dtype=torch.bfloat16, enabled=is_flash(model)):
        logits = model(**batch, use_cache=False).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(-1, batch["input_ids"][0, 1:, None]).squeeze(-1)
