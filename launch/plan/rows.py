"""How many rows a stage has and how long they are: read from its data where that is there, else as long as its config allows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import UserError

SAMPLE, LONGEST = 256, 64  # rows that are tokenised: evenly spread ones, and those with the most characters


@dataclass(frozen=True)
class Rows:
    """Training rows, pairs or prompts."""

    count: int | None  # None: the data is not there yet
    longest: int  # tokens; of a prompt in PPO
    mean: float  # tokens
    measured: bool  # by tokenising a sample; else what the config allows
    counted: int = 0  # SFT: most tokens of a row that the loss covers; 0 is not known


def rows_of(stage: str, cfg: Any, tokens: Any, limit: int) -> Rows:
    """What the data of a stage comes to within `limit` tokens a row (of a pair: its longer side)."""
    sources = cfg.prompts if stage == "ppo" else cfg.data
    missing = [s.path for s in sources if not s.path.startswith("hf:") and not Path(s.path).exists()]
    remote = any(s.path.startswith("hf:") for s in sources)
    if missing or remote or tokens is None:
        return Rows(None, limit, float(limit), measured=False)
    rows = _read(stage, cfg)
    chosen = _sample(rows)
    try:
        lengths, counted = _lengths(stage, cfg, tokens, chosen, limit)
    except UserError:
        lengths, counted = [], 0
    if not lengths:
        return Rows(len(rows), limit, float(limit), measured=False)
    spread = lengths[: min(SAMPLE, len(lengths))]
    return Rows(len(rows), max(lengths), sum(spread) / len(spread), measured=True, counted=counted)


def _read(stage: str, cfg: Any) -> list[Any]:
    from stages import data

    read: Any = {"sft": data.read_demonstrations, "ppo": data.read_prompts}.get(stage, data.read_pairs)
    return list(data.Splitter(cfg.split).split(read(cfg.prompts if stage == "ppo" else cfg.data).rows).train)


def _sample(rows: list[Any]) -> list[Any]:
    """Evenly spread rows first, then those with the most characters."""
    step = max(1, len(rows) // SAMPLE)
    return rows[::step][:SAMPLE] + sorted(rows, key=lambda row: len(str(row)), reverse=True)[:LONGEST]


def _lengths(stage: str, cfg: Any, tokens: Any, rows: list[Any], limit: int) -> tuple[list[int], int]:
    """Tokens of each row that is within the limit; in SFT the most of a row that the loss covers."""
    from stages import data

    if stage == "sft":
        encoded, _ = data.encode_demonstrations(tokens.formatter, rows, limit, "drop", cfg.loss_on, may_be_empty=True)
        return [len(row["input_ids"]) for row in encoded], max((sum(row["completion_mask"]) for row in encoded), default=0)
    if stage == "ppo":
        found, _ = data.encode_prompts(tokens.formatter, rows, max_length=limit, max_new_tokens=0, overlong="drop", may_be_empty=True)
        return [len(row["prompt_ids"]) for row in found], 0
    pairs, _ = data.encode_pairs(tokens.formatter, rows, limit, "drop", may_be_empty=True)
    return [len(pair["prompt_ids"]) + max(len(pair["chosen_ids"]), len(pair["rejected_ids"])) for pair in pairs], 0
