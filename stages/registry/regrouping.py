"""Weights from outside, tensor for tensor as they are, in the files that every model of this registry has.

In the hub's files of 5 GB each lies some of every kind of weight, so that a child which changes one kind shares none of them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stages import shards
from stages.registry.finite import read_header

# what torch reads and safetensors writes again as it was
_KNOWN = {"F64", "F32", "F16", "BF16", "F8_E5M2", "F8_E4M3", "I64", "I32", "I16", "I8", "U8", "BOOL"}


def regroup(files: Sequence[Path], folder: Path) -> bool:
    """Write the tensors of safetensors files to `folder`, in files as stages write them, and their index; one new file is in memory at a time.

    False, with nothing written, where the model is so small that it stays one file, or has a format that torch does not know.
    """
    entries = {name: (file, entry) for file in files for name, entry in read_header(file)[0].items() if name != "__metadata__"}
    sizes = {name: entry["data_offsets"][1] - entry["data_offsets"][0] for name, (_, entry) in entries.items()}
    layout = shards.split(sizes)
    if len(layout) == 1 or not {entry["dtype"] for _, entry in entries.values()} <= _KNOWN:
        return False
    for file, names in layout.items():
        _write(folder / file, {name: entries[name][0] for name in names})
    places = {name: file for file, names in layout.items() for name in names}
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(places.items()))}
    (folder / shards.INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return True


def _write(file: Path, sources: dict[str, Path]) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    tensors: dict[str, Any] = {}
    for source in sorted(set(sources.values())):
        with safe_open(source, "pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name, place in sources.items() if place == source}
    save_file(tensors, file, metadata={"format": "pt"})  # the metadata that save_pretrained writes: a child's file must be the same bytes
