"""What the pickles of a resumable save may name, checked by walking their opcodes before anything opens them.

Hashes show that a save is as it was written. They do not show by whom: who can write to the folder can write the list of hashes too. torch's own
`weights_only` would refuse foreign objects, but DeepSpeed opens its shards without it. So a save's pickles are read here as what they are,
programs for a small machine (`pickletools.genops` runs nothing), and one that names anything but tensors, their parts and DeepSpeed's own records is
refused. What can't be read in exactly one way is refused as well: a file that Python's zip reader and torch's could take for two different ones.
"""

from __future__ import annotations

import json
import pickletools
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

from configs.errors import UserError

PICKLES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt", ".npy", ".npz")  # what the Trainer, peft, DeepSpeed and numpy unpickle, or might
ALLOWED = {
    "collections OrderedDict", "collections defaultdict", "builtins set", "builtins dict", "builtins int", "__builtin__ set", "_codecs encode",
    "torch Size", "torch Tensor", "torch device", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter", "torch._tensor _rebuild_from_type_v2",
    "torch.serialization _get_layout", "torch.storage UntypedStorage", "torch.nn.parameter Parameter",
    "numpy dtype", "numpy ndarray", "numpy._core.multiarray _reconstruct", "numpy.core.multiarray _reconstruct", "numpy._core.multiarray scalar", "numpy.core.multiarray scalar",
    "deepspeed.runtime.fp16.loss_scaler LossScaler", "deepspeed.runtime.fp16.loss_scaler DynamicLossScaler", "deepspeed.runtime.zero.config ZeroStageEnum",
    "deepspeed.utils.tensor_fragment fragment_address",
}  # fmt: skip
STORAGE = re.compile(r"torch (?:Bool|Byte|Char|Short|Int|Long|Half|BFloat16|Float|Double|Quint8|QInt8)Storage")
DTYPE = re.compile(r"torch (?:u?int\d+|float\d+(?:_e\d+m\d+\w*)?|bfloat16|bool)")
UNUSUAL = {"STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4", "PERSID"}  # torch.save and numpy write none: each names an object in another way
END = b"PK\x05\x06"  # of a zip file's last record, 22 bytes long where it has no comment
TAG = re.compile(r"global_step\d+")


def check(save: Path) -> None:
    """Refuse a save in which a pickle names more than tensors are made of, or that points out of its own folder.

    Raises:
        UserError: naming the file and what it asks for. The save is left as it is, for whoever wants to know.
    """
    for file in sorted(save.rglob("*")):
        why = "it is a link; a save holds plain files only" if file.is_symlink() else None
        if why is None and file.name == "latest":
            why = bad_tag(file)
        elif why is None and file.is_file() and _may_be_pickle(file):
            why = problem(file)
        if why is not None:
            raise UserError(f"{file} is not opened: {why}. A save of ours holds nothing of the kind: find out who wrote it; delete {save} to go on from an older save")
    outside = foreign_best(save)
    if outside is not None:
        raise UserError(f"{save / 'trainer_state.json'}: its best save is {outside}, which is not beside this one; delete {save} to go on from an older save")


def _may_be_pickle(file: Path) -> bool:
    """By its name, or by its first bytes: a zip file, or a pickle of protocol 2 or later. Nothing unpickles a safetensors file, and one in 32 begins so:
    its first byte is the lowest of its header's length."""
    if file.suffix.lower() in PICKLES:
        return True
    if file.suffix.lower() == ".safetensors":
        return False
    with file.open("rb") as stream:
        start = stream.read(2)
    return start[:1] == b"\x80" or start == b"PK"


def problem(file: Path) -> str | None:
    """Why a file must not be unpickled; None for one of torch.save that holds tensors and plain values."""
    try:
        for name in globals_of(file):
            if name not in ALLOWED and not STORAGE.fullmatch(name) and not DTYPE.fullmatch(name):
                return f"it would call {name.replace(' ', '.')!r} when it is opened"
    except (ValueError, zipfile.BadZipFile, OSError, NotImplementedError) as error:
        return f"it is not a file as torch.save writes them ({error})"
    return None


def globals_of(file: Path) -> Iterator[str]:
    """"module name" of everything that the pickle in a file of torch.save asks for.

    Raises:
        ValueError, zipfile.BadZipFile: it is no such file, or one that another reader might read otherwise.
    """
    for opcode, argument, _ in pickletools.genops(_program(file)):
        if opcode.name in UNUSUAL:
            raise ValueError(f"its pickle uses {opcode.name}")
        if opcode.name == "GLOBAL":
            yield str(argument)


def _program(file: Path) -> bytes:
    """The one pickle in a file of torch.save, found as torch finds it."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(4)
        stream.seek(max(0, size - 22))
        end = stream.read(22)
    if start != b"PK\x03\x04" or end[:4] != END or end[20:] != b"\0\0":
        raise ValueError("no zip file from its first byte to its last")
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        folders = {name.partition("/")[0] for name in names}
        if len(folders) != 1 or len({name.lower() for name in names}) != len(names):
            raise ValueError("names in it stand twice, or not in one folder")
        (folder,) = folders
        if f"{folder}/data.pkl" not in names or any(name.startswith((f"{folder}/code/", f"{folder}/constants")) or (name.endswith(".pkl") and name != f"{folder}/data.pkl") for name in names):
            raise ValueError("it holds no data.pkl, or more programs than that")
        if archive.getinfo(f"{folder}/data.pkl").compress_type != zipfile.ZIP_STORED:
            raise ValueError("its pickle is compressed")
        return archive.read(f"{folder}/data.pkl")


def bad_tag(latest: Path) -> str | None:
    """Why DeepSpeed must not follow `latest`, which names a folder beside it; None where it may."""
    tag = latest.read_text(encoding="utf-8", errors="replace").strip()
    return None if TAG.fullmatch(tag) else f"it names {tag[:80]!r}, not a folder of this save"


def foreign_best(save: Path) -> str | None:
    """The save that the Trainer would load at the end for being the best, where that is none of this run's; None where it is, or there is none."""
    try:
        best = json.loads((save / "trainer_state.json").read_text(encoding="utf-8")).get("best_model_checkpoint")
    except FileNotFoundError:
        return None
    except (ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{save / 'trainer_state.json'} can't be read ({error}); delete {save} to go on from an older save") from error
    moved = best is not None and not Path(best).is_dir()  # the run's folder has another path now: the Trainer forgets this one, and the next save says the new one
    fits = best is None or ((moved or Path(best).parent.resolve() == save.parent.resolve()) and re.fullmatch(r"checkpoint-\d+", Path(best).name))
    return None if fits else str(best)
