"""Which tensors lie in which file of a model folder, so that what training leaves alone stays identical files, which the registry stores once.

Frozen layers: every layer (of deep models, every few) has its own files. Adapters that were merged: the projections they usually change, queries
and values, lie apart from the other attention weights, and those apart from the rest, the bulk. Embeddings and the head have files of their own.
The names of files and the index are Hugging Face's, so every loader reads them. Where a tensor lies depends on names and depth alone, and
safetensors orders tensors within a file by itself: identical tensors give identical files.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

INDEX, WHOLE = "model.safetensors.index.json", "model.safetensors"
SINGLE = 16 * 2**20  # bytes below which a model stays one file: twenty fsyncs and as many entries in every listing cost more than such bytes do
LARGEST = 16 * 2**30  # bytes of a file, unless one tensor is larger
_BULK, _ATTENTION = 32, 8  # files per stack of layers, for the bulk and for each of the two kinds of attention weights
_LAYER = re.compile(r"(.*?)\.(\d+)\.(.+)")
_ATTENDS = re.compile(r"(^|\.)(self_attn|self_attention|attention|attn|cross_attn)\.")
_ADAPTED = re.compile(r"(^|\.)([qv]_proj|[qv]_lin|query|value|qkv_proj|qkv|query_key_value|c_attn|Wqkv|in_proj)\.")
_EMBEDDING = re.compile(r"(^|\.)(embed\w*|wte|wpe|word_embeddings|tok_embeddings)\.")
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out|output)\.")


class _Group(NamedTuple):
    """What is kept together; sorts in the order of the files."""

    where: int  # 0 embeddings, 1 layers, 2 head, 3 the rest (last norm, score head)
    stack: str = ""
    block: int = 0
    part: str = ""


def split(sizes: Mapping[str, int], inherited: Mapping[str, str] | None = None) -> dict[str, list[str]]:
    """File name -> its tensors.

    sizes: tensor -> bytes. inherited: tensor -> file of the parent's folder; what lay together there stays together.
    """
    if not inherited and sum(sizes.values()) < SINGLE:
        return {WHOLE: sorted(sizes)}
    depth: dict[str, int] = {}
    for name in sizes:
        if found := _LAYER.fullmatch(name):
            depth[found[1]] = max(depth.get(found[1], 0), int(found[2]) + 1)
    groups: dict[tuple[str, _Group], list[str]] = {}
    for name in sizes:
        kept = (inherited or {}).get(name)
        groups.setdefault(("", _group(name, depth)) if kept is None else (kept, _Group(0)), []).append(name)
    shards = [shard for group in sorted(groups) for shard in _cut(sorted(groups[group]), sizes)]
    if len(shards) == 1:
        return {WHOLE: shards[0]}
    return {f"model-{number:05d}-of-{len(shards):05d}.safetensors": shard for number, shard in enumerate(shards, 1)}


def layout_of(folder: Path | str) -> dict[str, str]:
    """Tensor -> file of a model folder in several files; {} of any other."""
    try:
        found = json.loads((Path(folder) / INDEX).read_text(encoding="utf-8"))["weight_map"]
        return {str(name): str(file) for name, file in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _group(name: str, depth: Mapping[str, int]) -> _Group:
    if found := _LAYER.fullmatch(name):
        stack, layer, inner = found[1], int(found[2]), found[3]
        part = "rest" if not _ATTENDS.search(inner) else "adapted" if _ADAPTED.search(inner) else "attention"
        together = math.ceil(depth[stack] / (_BULK if part == "rest" else _ATTENTION))
        return _Group(1, stack, layer // together, part)
    return _Group(0 if _EMBEDDING.search(name) else 2 if _HEAD.search(name) else 3)


def _cut(names: list[str], sizes: Mapping[str, int]) -> list[list[str]]:
    """A group as files of at most LARGEST bytes."""
    shards: list[list[str]] = [[]]
    room = LARGEST
    for name in names:
        if shards[-1] and sizes[name] > room:
            shards.append([])
            room = LARGEST
        shards[-1].append(name)
        room -= sizes[name]
    return shards
