"""Train, validation and test: by prompt, never by row, and the same for every file and every stage."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Literal

from blake3 import blake3

from configs.errors import UserError
from stages.data.fingerprint import fingerprint
from stages.data.rows import Messages, R, Row, as_messages

if TYPE_CHECKING:
    from configs.schema.common import Split

Part = Literal["train", "validation", "test"]


def group_key(prompt: str | Messages) -> str:
    """The prompt's first user message, normalised: NFKC, casefolded, runs of whitespace as one space.

    Rows with one key are one group and never stand on both sides of a split. The system message does not count:
    the same question under another system prompt is the same question.
    """
    content = next(message.content for message in as_messages(prompt) if message.role == "user")
    return " ".join(unicodedata.normalize("NFKC", content).casefold().split())


def one_per_group(rows: Sequence[R]) -> list[R]:
    """The first row of each prompt group, in order."""
    first = {group_key(row.prompt): row for row in reversed(rows)}
    return [row for row in rows if first[group_key(row.prompt)] is row]


def unit_hash(*parts: object) -> float:
    """A number in [0, 1) that depends on nothing but `parts`: the first 52 bits of their BLAKE3."""
    digest = blake3("\x1f".join(map(str, parts)).encode()).digest(7)
    return (int.from_bytes(digest, "big") >> 4) / 2**52


@dataclass(frozen=True)
class Splits(Generic[R]):
    """Rows of one file set by part; `train` has the sources' weights applied. `report` is JSON for the manifest."""

    train: list[R]
    validation: list[R]
    test: list[R]
    report: dict[str, Any]


class Splitter:
    """Assigns rows to parts as a config's `split` says."""

    def __init__(self, split: Split) -> None:
        self.split_config = split
        self.always_test: frozenset[str] = frozenset()
        if split.test_prompts is not None:
            from configs.schema.common import Source
            from stages.data.read import read_prompts

            held_out = read_prompts([Source(path=str(split.test_prompts))]).rows
            self.always_test = frozenset(group_key(row.prompt) for row in held_out)

    def of(self, row: Row) -> Part:
        """The part of one row; a prompt of `test_prompts` is always test."""
        key = group_key(row.prompt)
        place = unit_hash("split", self.split_config.seed, key)
        if key in self.always_test or place < self.split_config.test:
            return "test"
        return "validation" if place < self.split_config.test + self.split_config.validation else "train"

    def facts(self) -> dict[str, Any]:
        """What manifests record of the split: equal facts mean equal parts. `always_test` is a digest of the prompts kept out."""
        cfg, kept_out = self.split_config, "\n".join(sorted(self.always_test))
        return {
            "seed": cfg.seed, "validation": cfg.validation, "test": cfg.test, "test_prompts": len(self.always_test),
            "always_test": blake3(kept_out.encode()).hexdigest() if self.always_test else None,
        }  # fmt: skip

    def split(self, rows: Sequence[R], need_train: bool = True) -> Splits[R]:
        """All rows by part, file order kept. Raises UserError when nothing is left to train on (if `need_train`)."""
        parts: dict[Part, list[R]] = {"train": [], "validation": [], "test": []}
        for row in rows:
            parts[self.of(row)].append(row)
        groups = {part: len({group_key(row.prompt) for row in members}) for part, members in parts.items()}
        if need_train and not parts["train"]:
            raise UserError(self._nothing_left(rows, groups))
        train = apply_weights(parts["train"], self.split_config.seed)
        final: dict[Part, list[R]] = {**parts, "train": train}
        report = {
            "rows": {part: len(members) for part, members in final.items()},
            "groups": groups,
            "fingerprint": {part: fingerprint(members) for part, members in final.items()},
            "split": self.facts(),
        }
        return Splits(train, parts["validation"], parts["test"], report)

    def _nothing_left(self, rows: Sequence[R], groups: dict[Part, int]) -> str:
        cfg = self.split_config
        return (
            f"nothing is left to train on: {len(rows)} rows in {sum(groups.values())} prompt groups all fell to validation "
            f"({groups['validation']} groups, share {cfg.validation}) and test ({groups['test']} groups, share {cfg.test}"
            + (f", test_prompts {cfg.test_prompts}" if cfg.test_prompts else "")
            + "); add rows with other prompts, or lower split.validation and split.test"
        )


def apply_weights(rows: Sequence[R], seed: int) -> list[R]:
    """Use each source's rows `weight` times: whole copies, and a seeded share of the rows for the rest.

    Weight 2.5 over 10 rows of one source gives 25: two copies of all and 5 rows once more.
    Raises UserError when the weights leave nothing.
    """
    if all(row.weight == 1 for row in rows):
        return list(rows)
    by_source: dict[tuple[str, float], list[R]] = {}
    for row in rows:
        by_source.setdefault((row.where.rpartition(":")[0], row.weight), []).append(row)
    result: list[R] = []
    for (_, weight), members in by_source.items():
        copies, rest = int(weight), weight - int(weight)
        result += members * copies
        order = sorted(range(len(members)), key=lambda i: unit_hash("weight", seed, members[i].where.rpartition(":")[2], i))
        result += [members[i] for i in sorted(order[: round(rest * len(members))])]
    if rows and not result:
        raise UserError(f"the weights of the sources leave none of {len(rows)} training rows; raise `weight`")
    return result
