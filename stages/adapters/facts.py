"""What the files of an adapter say of it, without loading it: its kind, its size, and whether it may lie beside others on one base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from blake3 import blake3

from configs.errors import UserError
from stages.foreign import ADAPTER, read_json
from stages.registry import Checkpoint, Registry
from stages.registry.finite import read_header

WEIGHTS = "adapter_model.safetensors"
IN_LAYERS = ("LORA", "IA3")  # kinds that sit in the base's layers, of which one is switched on at a time
OWN = ("lora_", "ia3_")  # in the names of their tensors
IN_FRONT = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING")  # kinds that stand before the text, of which a file holds this tensor
VECTORS = "prompt_embeddings"


@dataclass(frozen=True)
class AdapterFacts:
    """kind: as peft names it. rank: of a low-rank update, the largest where layers differ. trained: its parameters. size: bytes of its file.
    others: the base's own tensors in that file, such as embeddings that have grown. whole: names of modules trained whole beside it."""

    kind: str
    technique: str
    rank: int | None
    trained: int
    size: int
    others: tuple[str, ...]
    whole: tuple[str, ...]
    config: dict[str, Any]


def adapter_facts(folder: Path) -> AdapterFacts:
    """What `folder`, as peft writes it, holds. Raises UserError where it is not a whole adapter."""
    config = read_json(folder / ADAPTER)
    file = folder / WEIGHTS
    if not file.is_file():
        raise UserError(f"{folder} is an adapter without {WEIGHTS}; get it again, or train it again")
    sizes = {name: prod(entry["shape"]) for name, entry in read_header(file)[0].items() if name != "__metadata__"}
    kind, whole = str(config.get("peft_type")).upper(), tuple(config.get("modules_to_save") or ())
    others = tuple(sorted(name for name in sizes if not _is_own(name, kind, whole)))
    ranks = [config.get("r"), *(config.get("rank_pattern") or {}).values()]
    rank = max(map(int, ranks)) if kind == "LORA" and all(ranks) else None
    trained = sum(count for name, count in sizes.items() if name not in others)
    return AdapterFacts(kind, technique(config), rank, trained, file.stat().st_size, others, whole, config)


def _is_own(name: str, kind: str, whole: Sequence[str]) -> bool:
    if kind in IN_FRONT:
        return name == VECTORS
    return kind not in IN_LAYERS or any(part in name for part in OWN) or any(f".{module}." in f".{name}." for module in whole)


def technique(config: dict[str, Any]) -> str:
    """What people call it: lora, rslora, dora, ia3, prompt_tuning …"""
    named = str(config.get("peft_type")).lower()
    variants = [name for name, key in (("rslora", "use_rslora"), ("dora", "use_dora")) if config.get(key)]
    return "+".join(variants) if named == "lora" and variants else named


def digest_of(folder: Path, tensors: Sequence[str]) -> str:
    """BLAKE3 over the bytes of some tensors of an adapter's file; of none, the digest of nothing."""
    digest = blake3()
    if not tensors:
        return digest.hexdigest()
    header, start = read_header(folder / WEIGHTS)
    with open(folder / WEIGHTS, "rb") as file:
        for name in sorted(tensors):
            begin, end = header[name]["data_offsets"]
            file.seek(start + begin)
            digest.update(name.encode() + b"\0")
            left = end - begin
            while left and (block := file.read(min(left, 2**24))):
                digest.update(block)
                left -= len(block)
    return digest.hexdigest()


@dataclass(frozen=True)
class Listed:
    """An adapter of a registry. base: how it was called; base_id: None for one from outside the registry. how: of a combination, by which method."""

    checkpoint: Checkpoint
    base: str
    base_id: str | None
    facts: AdapterFacts
    how: str | None

    def to_json(self) -> dict[str, Any]:
        """For machines."""
        item = self.checkpoint
        return {
            "ref": item.ref, "id": item.id, "base": self.base, "base_id": self.base_id, "technique": self.facts.technique, "rank": self.facts.rank,
            "trainable_parameters": self.facts.trained, "size": self.facts.size, "metrics": item.info("metrics") or {}, "combined": self.how,
        }  # fmt: skip


def listed(registry: Registry, base: str | None = None) -> list[Listed]:
    """The adapters of a registry, those of one base next to each other; `base` (a reference, a folder or a hub name): of this one only.

    Raises UserError for a reference that means nothing.
    """
    wanted = registry.id_of(base) if base is not None and _is_reference(base) else base
    found = []
    for item in registry.list():
        record = (item.info("stage_info") or {}).get("adapter")
        if not record:
            continue
        base_id = record.get("base_id") or None
        if wanted is not None and wanted != base_id and (base_id is not None or not _same_place(wanted, str(record["base"]))):
            continue
        combined = (item.info("stage_info") or {}).get("combined") or {}
        found.append(Listed(item, registry.ref_of(base_id) if base_id else str(record["base"]), base_id, adapter_facts(item.model_dir), combined.get("how")))
    return sorted(found, key=lambda one: (one.base, one.checkpoint.stage, one.checkpoint.name, one.checkpoint.version))


def _is_reference(text: str) -> bool:
    from configs.references import is_reference
    from stages.registry.names import is_id

    return (is_reference(text) or is_id(text)) and not Path(text).is_dir()


def _same_place(one: str, other: str) -> bool:
    return one == other or Path(one).expanduser().absolute() == Path(other).expanduser().absolute()
