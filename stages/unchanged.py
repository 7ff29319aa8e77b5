"""What training left alone is written as its parent has it: in the parent's dtype, byte for byte, so that the registry stores it once.

Stages train and publish float32, and most models from outside are bfloat16: written in float32, frozen layers would be other files than the parent's,
and twice as long. Casting to float32 changes no number, so equal numbers may be kept in either format. What was trained keeps the dtype it was
trained in: rounded to bfloat16 the published model would not be the one that was measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from configs.errors import UserError
from stages import shards
from stages.compat import files_of_weights
from stages.registry.finite import read_header

if TYPE_CHECKING:
    from stages.models import Origin

CHUNK = 2**22  # numbers compared together: what this takes of memory beside the tensors themselves
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@contextmanager
def written_like(origin: Origin | None) -> Iterator[None]:
    """Within the block `save_pretrained` writes whole weights that were made from `origin`: in files as its are, what has its numbers as it has them."""
    folder = weights_under(origin) if origin is not None else None
    original = Original(folder)
    # of a folder from outside nothing can be shared, and the hub's layout would keep what is trained and what is frozen together for good
    inherited = shards.layout_of(folder) if folder is not None and origin is not None and origin.checkpoint is not None else {}
    with files_of_weights(partial(original.split, inherited=inherited), original.restored):
        yield


def weights_under(origin: Origin) -> Path | None:
    """The folder with the whole weights that a model has, or has under its adapters; None where there is none on this machine (any more)."""
    from huggingface_hub import try_to_load_from_cache

    from stages.models import with_bases

    try:
        folder = with_bases(origin)[-1].folder
        if Path(folder).is_dir():
            return Path(folder)
        found = try_to_load_from_cache(folder, "config.json")
    except (UserError, ValueError, OSError):  # a base that has gone since it was loaded, a name that is none of the hub's
        return None
    return Path(found).parent if isinstance(found, str) else None


class Original:
    """The whole weights of a model folder, of which one tensor at a time is looked at; none of a folder that can't be read, or of None."""

    def __init__(self, folder: Path | None) -> None:
        self.files: dict[str, Path] = {}
        self.entries: dict[str, dict[str, Any]] = {}  # as in a safetensors header: dtype, shape, data_offsets
        try:
            for file in _files(folder) if folder is not None else []:
                header = {name: entry for name, entry in read_header(file)[0].items() if name != "__metadata__"}
                self.entries |= header
                self.files |= dict.fromkeys(header, file)
        except (UserError, OSError):  # training is over: a parent that was removed meanwhile costs room, not the model
            self.files, self.entries = {}, {}

    def split(self, tensors: Mapping[str, Tensor], inherited: Mapping[str, str]) -> dict[str, list[str]]:
        """File -> tensors, as `shards.split` lays out the parent: by its sizes, so that a child in float32 is not cut elsewhere."""
        return shards.split({name: self._bytes(name, tensor) for name, tensor in tensors.items()}, inherited)

    def restored(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of one file, each as this folder holds it where that has the same numbers."""
        from safetensors import SafetensorError, safe_open

        out = dict(tensors)
        known = {name for name in tensors if self._fits(name, tensors[name])}
        for file in sorted({self.files[name] for name in known}):
            try:
                with safe_open(file, "pt") as opened:
                    for name in sorted(name for name in known if self.files[name] == file):
                        found = opened.get_tensor(name)
                        if same_numbers(tensors[name], found):
                            out[name] = found
            except (SafetensorError, OSError):
                continue
        return out

    def _fits(self, name: str, tensor: Tensor) -> bool:
        return name in self.entries and self.entries[name]["shape"] == list(tensor.shape)

    def _bytes(self, name: str, tensor: Tensor) -> int:
        if not self._fits(name, tensor):
            return tensor.numel() * tensor.element_size()
        begin, end = self.entries[name]["data_offsets"]
        return int(end - begin)


def _files(folder: Path) -> list[Path]:
    named = set(shards.layout_of(folder).values()) or {shards.WHOLE}
    return [folder / name for name in sorted(named) if Path(name).name == name]


@torch.no_grad()
def same_numbers(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape hold the same numbers to the bit (-0 is not 0), whichever floating formats they are kept in."""
    if one.dtype not in _FLOATS or other.dtype not in _FLOATS:
        return False
    common = torch.promote_types(one.dtype, other.dtype)  # holds every number of both
    bits = _BITS[common.itemsize]
    pairs = zip(one.reshape(-1).split(CHUNK), other.reshape(-1).split(CHUNK), strict=True)
    return all(torch.equal(a.to("cpu", common).view(bits), b.to("cpu", common).view(bits)) for a, b in pairs)
