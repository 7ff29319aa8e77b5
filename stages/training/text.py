"""What a stage's model, tokenizer and rows come to: lengths, embeddings, and what the manifest says of the data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from configs.schema import StageConfig, TRLStage, lora_of
from stages import data, models, soft
from stages.tokens import ModelTokens
from stages.training import plan
from stages.training.ranks import say
from stages.tuning.adapters import check_lora_targets


def fit(model: Any, tokens: ModelTokens, cfg: TRLStage) -> int:
    """Grow the embeddings for a new pad token; the tokens a row may have: max_length, or the model's positions if fewer."""
    for note in tokens.notes:
        say(f"tokenizer: {note}")
    check_lora_targets(model, lora_of(cfg))
    models.resize_to(model, len(tokens.tokenizer))
    model.config.pad_token_id = tokens.pad_id  # a sequence classifier finds its last token by it
    return row_limit(model, cfg)


def row_limit(model: Any, cfg: StageConfig) -> int:
    """The tokens a row may have: max_length, or the model's positions if fewer."""
    positions = soft.room(model) or cfg.max_length
    if positions < cfg.max_length:
        say(f"max_length: the model has {positions} positions for text, so rows of at most {positions} tokens are used, not {cfg.max_length}")
    return min(cfg.max_length, positions)


def data_facts(loaded: data.Loaded, splits: data.Splits, dropped: dict[str, int], general: dict[str, Any] | None = None) -> dict[str, Any]:
    """info["data"] of the manifest: fingerprints (order included), rows used and dropped per part, and the split; `general`: of text that is mixed in."""
    report = splits.report
    used = {part: count - dropped.get(part, 0) for part, count in report["rows"].items()}
    return {
        "fingerprint": data.fingerprint(loaded.rows), "rows": used,
        "parts": report["fingerprint"] | ({"rehearsal": general["fingerprint"]} if general else {}),
        "dropped": {"overlong": dropped, "equal_pairs": loaded.report.equal_pairs},
        "split": report["split"] | {"groups": report["groups"]}, "sources": loaded.report.sources,
        **({"rehearsal": general} if general else {}),
    }  # fmt: skip


def report_rows(facts: dict[str, Any], warnings: list[str]) -> None:
    """Say how many rows each part has, what was dropped, and what the reader noticed."""
    for warning in warnings:
        say(f"data: {warning}")
    rows, too_long = facts["rows"], sum(facts["dropped"]["overlong"].values())
    counts = f"{rows['train']} training, {rows['validation']} validation, {rows['test']} test rows"
    say(f"data: {counts}" + (f"; {too_long} too long, dropped" if too_long else ""))


def report_padding(lengths: Sequence[int], steps: plan.Plan, seed: int, micro_batch_size: int) -> None:
    """Say what share of the tokens in batches is padding, in this order of rows and in a random one."""
    random = plan.row_order(replace(steps, lengths=None), seed)
    ours = plan.padding_share(plan.sorted_steps(lengths, steps, seed), lengths, micro_batch_size)
    say(f"padding: {ours:.1%} of the tokens in batches; rows in random order would have {plan.padding_share(random, lengths, micro_batch_size):.1%}")
