"""Models that are named on a hub are downloaded by one process per node, node 0's first, before any process loads them."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from stages.nodes.once import once_per_node
from stages.nodes.place import local_world_size, node_count

FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]  # of a model; other formats of the same weights stay where they are


def fetch(names: Iterable[str]) -> None:
    """Have those of `names` that are no folders here in this node's hub cache; every process calls this. Nothing where there is one process.

    What can't be had is left to the loading, which says why.
    """
    wanted = [name for name in names if not Path(name).is_dir()]
    if not wanted or (local_world_size() == 1 and node_count() == 1):
        return
    once_per_node("downloading", lambda: _download(wanted), node_0_first=True)


def _download(names: list[str]) -> None:
    import huggingface_hub

    for name in names:
        with suppress(OSError, ValueError):  # without network the cache may hold what is needed; loading finds out
            huggingface_hub.snapshot_download(name, allow_patterns=FILES)
