"""What the rows of demonstrations say beside their turns, for metrics of the user: read when somebody asks, so that training rows carry none of it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from stages.data.files import read_records
from stages.data.formats import RESERVED, is_scalar
from stages.data.read import OUR_COLUMNS

if TYPE_CHECKING:
    from configs.schema.common import Source

TAKEN = frozenset({*OUR_COLUMNS["demonstrations"], *RESERVED, "references"})


def columns_at(sources: Sequence[Source], places: Collection[str]) -> dict[str, dict[str, Any]]:
    """Place ("file:row", as `where` of a row) -> its scalar columns by name, but for those that demonstrations are made of.

    Raises UserError as `read_records` does.
    """
    wanted = set(places)
    return {
        record.where: {name: value for name, value in record.fields.items() if name not in TAKEN and is_scalar(value)}
        for source in sources for record in read_records(source, []) if record.where in wanted
    }  # fmt: skip
