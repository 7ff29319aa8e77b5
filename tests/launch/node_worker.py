"""SFT that writes down which process read and tokenised: `-m tests.launch.node_worker --config FILE`, counts in NODE_WORKER_COUNTS."""

from __future__ import annotations

import os
from pathlib import Path

from stages import data, sft
from stages.training import entry


def counted(name: str) -> None:
    """Have `stages.data`'s function write a file per call: NAME-RANK-NODE-TIME."""
    function = getattr(data, name)

    def wrapper(*args, **kwargs):
        folder = Path(os.environ["NODE_WORKER_COUNTS"])
        for number in range(99):
            file = folder / f"{name}-{os.environ['RANK']}-{os.environ['GROUP_RANK']}-{number}"
            if not file.exists():
                file.touch()
                break
        return function(*args, **kwargs)

    setattr(data, name, wrapper)


if __name__ == "__main__":
    for function in ("read_demonstrations", "encode_demonstrations"):
        counted(function)
    entry.run(sft.main, "sft")
