"""What the command line says of the machine, as overrides for every stage of a chain."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from launch.chain.steps import STAGES


def machine_overrides(chain_file: str | Path, overrides: Sequence[str], machine: str | None, processes: int | None) -> list[str]:
    """`overrides`, and after them --machine and --processes for the chain and for each section that it has.

    A section's own value counts more than the chain's, and a resolved chain (OUTPUT/chain.yaml, what `align plan --fit` writes) has one in every section:
    given to the chain alone, the options would be ignored without a word.

    Raises UserError for a chain file that does not load.
    """
    from configs.load import load

    asked = {key: json.dumps(value) for key, value in (("machine", machine), ("processes", processes)) if value is not None}
    if not asked:
        return list(overrides)
    whole = [*overrides, *(f"{key}={value}" for key, value in asked.items())]
    chain = load(chain_file, "chain", whole)  # a value that is refused is told once, not for every section
    present = [stage for stage in STAGES if getattr(chain, stage) is not None]
    return [*whole, *(f"{stage}.{key}={value}" for stage in present for key, value in asked.items())]
