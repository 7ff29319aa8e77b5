"""Schema of rehearsal: general text that SFT trains on beside the task, so that less of what the model could do is lost."""

from __future__ import annotations

from pydantic import Field

from configs.schema.common import PositiveInt, Sources, Strict


class Rehearsal(Strict):
    """General rows in every optimizer step. The loss is the task's mean over its tokens plus `weight` times theirs over their tokens."""

    data: Sources = Field(description="General text: .txt files and sources with format: text (the loss covers all of it), or demonstrations (it covers their answers).")
    share: float = Field(default=0.1, gt=0, lt=1, description="Share of the rows of every optimizer step (train.batch_size) that are general; at least one row is.")
    tokens: PositiveInt | None = Field(default=None, description="Tokens of a row of plain text, into which documents are cut; null is max_length.")
    weight: float = Field(
        default=0.3, gt=0, description="Weight of the general rows' loss (mean over their tokens) beside the task's (mean over its tokens). At equal steps 0.3 forgot 73 % less "
        "for 1.6 % of task loss on the small model that it was measured on, 1 forgot 82 % less for 5.5 % (tests/bench/rehearsal.py).",
    )  # fmt: skip
