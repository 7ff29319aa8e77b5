"""Attacks on resumable saves and on whatever else may be a pickle."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from configs.errors import UserError
from tests.security.attack import HARMLESS, REFUSED, Attack, Place

SAVED = (
    "optimizer.pt", "scheduler.pt", "rng_state.pth", "rng_state_0.pth", "scaler.pt", "training_args.bin", "pytorch_model.bin", "adapter_model.bin", "model.ckpt",
    "global_step4/mp_rank_00_model_states.pt", "global_step4/zero_pp_rank_0_mp_rank_00_optim_states.pt", "global_step4/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt",
)  # fmt: skip


def save_of(place: Place, file: str, write: Callable[[Path], Any]) -> Path:
    """A sealed save with one file of the attacker's, who could write the list of hashes too."""
    save = place.folder / "resume" / "checkpoint-4"
    save.mkdir(parents=True)
    (save / "trainer_state.json").write_text(json.dumps({"global_step": 4, "best_model_checkpoint": None}))
    (save / file).parent.mkdir(exist_ok=True)
    write(save / file)
    reseal(save)
    return save


def reseal(save: Path) -> None:
    """Write the list of a save's hashes as it would have to be."""
    from stages.training import saves

    depends_on = saves.read_seal(save)["depends_on"] if (save / saves.SEAL).exists() else {}
    saves.seal(save, saves.recorded(save, 0, 1), depends_on)


def opened(save: Path, file: str) -> None:
    """What a resume does: the hashes, the check of pickles, and then DeepSpeed's own way of opening a shard."""
    from stages.training import pickles, saves

    if why := saves.problem(save):
        raise UserError(why)
    pickles.check(save)
    torch.load(save / file, weights_only=False)


def in_save(file: str, write: Callable[[Place, Path], Any] | None = None) -> Callable[[Place], None]:
    def run(place: Place) -> None:
        save = save_of(place, file, lambda target: write(place, target) if write else place.torch_save(target))
        opened(save, file)

    return run


def program(place: Place, protocol: int = 2) -> bytes:
    return pickle.dumps({"state": place.planted}, protocol=protocol)


def raw_pickle(place: Place, target: Path) -> None:
    target.write_bytes(program(place))


def legacy(place: Place, target: Path) -> None:
    torch.save({"state": place.planted}, target, _use_new_zipfile_serialization=False)


def old_tar(place: Place, target: Path) -> None:
    with tarfile.open(target, "w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            entry = tarfile.TarInfo(name)
            content = program(place)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def zipped(*extra: tuple[str, Any], before: bytes = b"", after: bytes = b"", protocol: int = 2) -> Callable[[Place, Path], None]:
    """A file of torch.save whose pickle is innocent, with other entries: a name, and the hostile pickle (None) or bytes."""

    def write(place: Place, target: Path) -> None:
        entries = [("archive/data.pkl", pickle.dumps({"state": 1}, protocol=2)), ("archive/version", b"3\n"), ("archive/byteorder", b"little")]
        hostile = [(name, program(place, protocol) if content is None else content) for name, content in extra]
        target.write_bytes(before + place.zip_of(*entries, *hostile) + after)

    return write


def stack_global(place: Place, target: Path) -> None:
    """The newer way to name a function, which a search for GLOBAL alone would miss."""
    target.write_bytes(place.zip_of(("archive/data.pkl", program(place, 4)), ("archive/version", b"3\n")))


def through_an_allowed_module(place: Place, target: Path) -> None:
    """A dotted name under a module from which other names are allowed."""
    call = f"cos\nmkdir\n(V{place.canary}\ntR.".encode()
    target.write_bytes(place.zip_of(("archive/data.pkl", call.replace(b"cos\nmkdir", b"ctorch.serialization\nos.mkdir")), ("archive/version", b"3\n")))


def inst(place: Place, target: Path) -> None:
    target.write_bytes(place.zip_of(("archive/data.pkl", f"(V{place.canary}\nios\nmkdir\n.".encode()), ("archive/version", b"3\n")))


def two_archives(place: Place, target: Path) -> None:
    """One zip file behind another: readers differ in which end they begin at."""
    hostile = place.zip_of(("archive/data.pkl", program(place)), ("archive/version", b"3\n"))
    target.write_bytes(hostile + place.zip_of(("archive/data.pkl", pickle.dumps({}, 2)), ("archive/version", b"3\n"))[4:])


def object_array(place: Place, target: Path) -> None:
    import numpy as np

    np.save(target, np.array([place.planted], dtype=object), allow_pickle=True)


def tag_elsewhere(place: Place) -> None:
    """`latest` names the folder that DeepSpeed opens shards in."""
    place.torch_save(place.folder / "evil" / "mp_rank_00_model_states.pt")
    save = save_of(place, "latest", lambda file: file.write_text("../../evil"))
    opened(save, "../../evil/mp_rank_00_model_states.pt")


def best_elsewhere(place: Place) -> None:
    """The Trainer loads the best save at the end, from wherever its state says that it lies."""
    place.torch_save(place.folder / "evil" / "checkpoint-2" / "optimizer.pt")
    state = {"global_step": 4, "best_model_checkpoint": str(place.folder / "evil" / "checkpoint-2")}
    save = save_of(place, "trainer_state.json", lambda file: file.write_text(json.dumps(state)))
    opened(save, str(place.folder / "evil" / "checkpoint-2" / "optimizer.pt"))


def linked(place: Place) -> None:
    hostile = place.torch_save(place.folder / "elsewhere.pt")
    opened(save_of(place, "optimizer.pt", lambda file: file.symlink_to(hostile)), "optimizer.pt")


def changed_after_sealing(place: Place) -> None:
    """Without the list of hashes an attacker gets no further than that."""
    save = save_of(place, "optimizer.pt", lambda file: place.torch_save(file, 1.0))
    place.torch_save(save / "optimizer.pt")
    opened(save, "optimizer.pt")


def list_without_end(place: Place) -> None:
    from stages.training import saves

    save = save_of(place, "scheduler.pt", lambda file: place.torch_save(file))
    (save / saves.SEAL).write_text("[" * 200_000)
    opened(save, "scheduler.pt")


def linked_save(place: Place) -> None:
    """A link named as a save: what it points to was to be removed as a save that does not verify."""
    from stages.training import saves

    precious = place.write("precious/file.txt", "keep me").parent
    (place.folder / "resume").mkdir()
    (place.folder / "resume" / "checkpoint-9").symlink_to(precious)
    assert saves.saves(place.folder / "resume") == []


def sound_saves_open(place: Place) -> None:
    """The other side: what torch, numpy and DeepSpeed write passes."""
    import numpy as np

    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(3))])
    value = {"optimizer": optimizer.state_dict(), "numpy": np.random.get_state(), "cpu": torch.random.get_rng_state(), "bf16": torch.ones(2, dtype=torch.bfloat16)}
    save = save_of(place, "optimizer.pt", lambda file: torch.save(value, file))
    opened(save, "optimizer.pt")


def published(name: str) -> Callable[[Place], None]:
    def run(place: Place) -> None:
        from stages.registry import Registry

        def write(folder: Path) -> None:
            shutil.copytree(place.sound, folder, dirs_exist_ok=True)
            place.torch_save(folder / name)

        Registry(place.folder / "registry").publish("sft", "evil", write)

    return run


def data_file(name: str) -> Callable[[Place], None]:
    def run(place: Place) -> None:
        from configs.schema.common import Source
        from stages.data import read_demonstrations

        read_demonstrations([Source(path=str(place.write(name, program(place))))])

    return run


def parquet_with_a_python_type(place: Place) -> None:
    """Arrow's Python extension types are pickled into a file's metadata."""
    import pyarrow
    import pyarrow.parquet

    from configs.schema.common import Source
    from stages.data import read_demonstrations

    metadata = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": program(place)}
    fields = [pyarrow.field("prompt", pyarrow.string(), metadata=metadata), pyarrow.field("completion", pyarrow.string())]
    file = place.folder / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table([["q"], ["a"]], schema=pyarrow.schema(fields)), file)
    assert len(read_demonstrations([Source(path=str(file))]).rows) == 1


ATTACKS = [
    *(Attack(f"pickle in {name}", "a resumable save whose list of hashes was rewritten", REFUSED, in_save(name), "would call") for name in SAVED),
    Attack("object array", "x.npy in a resumable save", REFUSED, in_save("x.npy", object_array), "not a file as torch.save writes"),
    Attack("raw pickle", "a save's optimizer.pt", REFUSED, in_save("optimizer.pt", raw_pickle), "not a file as torch.save writes"),
    Attack("torch's legacy format", "a save's optimizer.pt", REFUSED, in_save("optimizer.pt", legacy), "not a file as torch.save writes"),
    Attack("torch's oldest format, a tar file", "a save's optimizer.pt", REFUSED, in_save("optimizer.pt", old_tar), "not a file as torch.save writes"),
    Attack("STACK_GLOBAL", "the check of pickles", REFUSED, in_save("optimizer.pt", stack_global), "STACK_GLOBAL"),
    Attack("INST", "the check of pickles", REFUSED, in_save("optimizer.pt", inst), "INST"),
    Attack("a dotted name in an allowed module", "the check of pickles", REFUSED, in_save("optimizer.pt", through_an_allowed_module), "would call"),
    Attack("data.pkl twice", "the check of pickles", REFUSED, in_save("optimizer.pt", zipped(("archive/data.pkl", None))), "twice"),
    Attack("DATA.PKL beside data.pkl", "the check of pickles (torch's zip reader knows no case)", REFUSED, in_save("optimizer.pt", zipped(("archive/DATA.PKL", None))), "twice"),
    Attack("a second folder in the zip file", "the check of pickles", REFUSED, in_save("optimizer.pt", zipped(("other/data.pkl", None))), "one folder"),
    Attack("TorchScript", "torch.load, which runs such a file", REFUSED, in_save("optimizer.pt", zipped(("archive/constants.pkl", None), ("archive/code/a.py", b"x"))), "more programs"),
    Attack("bytes after the zip file", "the check of pickles", REFUSED, in_save("optimizer.pt", zipped(after=b"PK\x05\x06" + b"\0" * 30)), "no zip file"),
    Attack("bytes before the zip file", "the check of pickles", REFUSED, in_save("optimizer.pt", zipped(before=b"\x80\x02")), "no zip file"),
    Attack("two zip files in one", "the check of pickles", REFUSED, in_save("optimizer.pt", two_archives)),
    Attack("`latest` leads out of the save", "DeepSpeed's choice of a folder", REFUSED, tag_elsewhere, "not a folder of this save"),
    Attack("best save elsewhere", "the Trainer's load of the best save", REFUSED, best_elsewhere, "not beside this one"),
    Attack("link in a save", "a resumable save", REFUSED, linked),
    Attack("pickle changed after the hashes", "a resumable save", REFUSED, changed_after_sealing, "damaged"),
    Attack("list of hashes without end", "a resumable save", REFUSED, list_without_end, "damaged"),
    Attack("link named as a save", "removal of saves that do not verify", HARMLESS, linked_save),
    Attack("(control) a sound save opens", "a resumable save", HARMLESS, sound_saves_open),
    *(Attack(f"publish {name}", "the registry", REFUSED, published(name), "pickle") for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "sub/x.pkl")),
    *(Attack(f"data: {name}", "the reader of data", REFUSED, data_file(name)) for name in ("rows.pkl", "rows.npy", "rows.pt", "rows.parquet", "rows.jsonl")),
    Attack("pickled type in parquet", "the reader of data", HARMLESS, parquet_with_a_python_type),
]
