"""SFT that writes down which process downloaded, read and tokenised: `-m tests.launch.node_worker --config FILE`, counts in NODE_WORKER_COUNTS."""

from __future__ import annotations

import os
from pathlib import Path

import huggingface_hub

from stages import data, sft
from stages.nodes.fetch import fetch
from stages.training import entry


def counted(module, name: str) -> None:
    """Have a module's function write a file per call: NAME-RANK-NODE-NUMBER."""
    function = getattr(module, name)

    def wrapper(*args, **kwargs):
        folder = Path(os.environ["NODE_WORKER_COUNTS"])
        for number in range(99):
            file = folder / f"{name}-{os.environ['RANK']}-{os.environ['GROUP_RANK']}-{number}"
            if not file.exists():
                file.touch()
                break
        return function(*args, **kwargs)

    setattr(module, name, wrapper)


def main(cfg):
    """A model on a hub first, whose download is counted and fails, then SFT."""
    fetch(["somebody/somemodel", cfg.init_from])
    sft.main(cfg)


if __name__ == "__main__":
    for function in ("read_demonstrations", "encode_demonstrations"):
        counted(data, function)
    huggingface_hub.snapshot_download = lambda name, **_: Path(f"/nowhere/{name}").stat()
    counted(huggingface_hub, "snapshot_download")
    entry.run(main, "sft")
