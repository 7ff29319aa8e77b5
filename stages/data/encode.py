"""Rows to token ids within a length, and the proof that the loss covers what it should."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

from configs.errors import UserError
from stages.data.formatter import Formatter
from stages.data.rows import Demonstration, PreferencePair, Prompt

Overlong = Literal["drop", "error"]
Item = TypeVar("Item", Demonstration, PreferencePair, Prompt)
Encoded = dict[str, Any]


def encode_demonstrations(
    formatter: Formatter, rows: Sequence[Demonstration], max_length: int, overlong: Overlong = "drop", loss_on: str = "all", *,
    may_be_empty: bool = False,
) -> tuple[list[Encoded], int]:
    """({"input_ids", "completion_mask"} per row in order, number dropped). Lengths in tokens, prompt and completion.

    Raises UserError for a row above `max_length` if `overlong` is "error", when every row is (unless `may_be_empty`: a part that is
    not trained on), and for a mask that covers nothing or everything.
    """

    def encode(row: Demonstration) -> Encoded:
        encoded = formatter.demonstration(row, loss_on)
        _check_mask(encoded["completion_mask"], row.where)
        return encoded

    return _within(rows, encode, lambda encoded: len(encoded["input_ids"]), max_length, overlong, "max_length", may_be_empty)


def encode_pairs(
    formatter: Formatter, rows: Sequence[PreferencePair], max_length: int, overlong: Overlong = "drop", *, may_be_empty: bool = False
) -> tuple[list[Encoded], int]:
    """({"prompt_ids", "chosen_ids", "rejected_ids", "row"[, "margin"]} per pair in order, number dropped).

    A pair's length is that of the prompt with the longer completion. `margin` is there if any row has one; a row without gets 0.
    Pairs that tokenise to the same ids cannot be told apart and are an error. Raises UserError as `encode_demonstrations` does.
    """
    with_margin = any(row.margin is not None for row in rows)

    def encode(row: PreferencePair) -> Encoded:
        encoded: Encoded = dict(formatter.pair(row))
        if encoded["chosen_ids"] == encoded["rejected_ids"]:
            raise UserError(f"{row.where}: chosen and rejected differ in the file but are the same tokens; leave this row out")
        return encoded | {"row": row} | ({"margin": row.margin or 0.0} if with_margin else {})

    def length(encoded: Encoded) -> int:
        return len(encoded["prompt_ids"]) + max(len(encoded["chosen_ids"]), len(encoded["rejected_ids"]))

    return _within(rows, encode, length, max_length, overlong, "max_length", may_be_empty)


def encode_prompts(
    formatter: Formatter, rows: Sequence[Prompt], max_length: int, max_new_tokens: int, overlong: Overlong = "drop", may_be_empty: bool = False
) -> tuple[list[Encoded], int]:
    """({"prompt_ids", "row"} per prompt in order, number dropped); prompts leave room for `max_new_tokens` within `max_length`."""
    room = max_length - max_new_tokens
    if room < 1:
        raise UserError(f"max_new_tokens {max_new_tokens} leaves no room for a prompt within max_length {max_length}; raise max_length")

    def encode(row: Prompt) -> Encoded:
        try:
            return {"prompt_ids": formatter.prompt_ids(row.prompt), "row": row}
        except UserError as error:
            raise UserError(f"{row.where}: {error}") from None

    return _within(rows, encode, lambda encoded: len(encoded["prompt_ids"]), room, overlong, "max_length - max_new_tokens", may_be_empty)


def _within(
    rows: Sequence[Item], encode: Callable[[Item], Encoded], length: Callable[[Encoded], int], limit: int, overlong: Overlong, name: str,
    may_be_empty: bool = False,
) -> tuple[list[Encoded], int]:
    kept: list[Encoded] = []
    longest, longest_where = 0, ""
    for row in rows:
        encoded = encode(row)
        tokens = length(encoded)
        if tokens > longest:
            longest, longest_where = tokens, row.where
        if tokens <= limit:
            kept.append(encoded)
        elif overlong == "error":
            raise UserError(f"{row.where}: has {tokens} tokens, more than {name} = {limit}; raise max_length, or set `overlong: drop`")
    if rows and not kept and not may_be_empty:
        raise UserError(
            f"all {len(rows)} rows are longer than {name} = {limit} tokens; the longest has {longest} ({longest_where}): raise max_length "
            f"by {longest - limit} to keep all"
        )
    return kept, len(rows) - len(kept)


def _check_mask(mask: Sequence[int], where: str) -> None:
    covered = sum(map(bool, mask))
    if not covered:
        raise UserError(f"{where}: the loss covers no token; the row would teach nothing")
    if covered == len(mask):
        raise UserError(f"{where}: the loss covers all {covered} tokens; the prompt must not be learned (is it empty under this template?)")


def prove_loss_mask(formatter: Formatter, encoded: Sequence[Encoded], n: int = 3, where: Sequence[str] | None = None) -> list[str]:
    """What the loss covers in `n` rows spread over the set, decoded, for the log.

    `encoded`: rows with "input_ids" and "completion_mask"; `where` names them (else their index does). Every row is checked.
    Raises UserError when a mask covers nothing or everything, or differs in length from its ids.
    """
    if not encoded:
        raise UserError("there are no rows whose loss mask could be shown")
    places = where if where is not None else [f"encoded row {index}" for index in range(len(encoded))]
    for place, row in zip(places, encoded, strict=True):
        if len(row["completion_mask"]) != len(row["input_ids"]):
            raise UserError(f"{place}: the loss mask has {len(row['completion_mask'])} entries for {len(row['input_ids'])} tokens")
        _check_mask(row["completion_mask"], place)
    chosen = sorted({index * len(encoded) // n for index in range(min(n, len(encoded)))}) if len(encoded) > n else range(len(encoded))
    return [" … ".join(formatter.decode(run) for run in covered_runs(encoded[index])) for index in chosen]


def covered_runs(row: Encoded) -> list[list[int]]:
    """The unbroken stretches of ids under the mask, in order."""
    runs: list[list[int]] = []
    previous = False
    for token, counts in zip(row["input_ids"], map(bool, row["completion_mask"]), strict=True):
        if counts and not previous:
            runs.append([])
        if counts:
            runs[-1].append(token)
        previous = counts
    return runs
