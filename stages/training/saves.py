"""Resumable saves as folders: staged, sealed, renamed, read back; found again and judged on resume. Supervised stages and PPO share this.

Every process writes its part under a staging name and hashes it; rank 0 writes the seal (hashes, sizes, and what the save depends on), renames
the folder once, and the older saves go only when the new one has been read back from the disk and found as it was written. A write that fails
(a full disk) on any process costs the save and not the run: all learn of it and none is left waiting.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from stages.registry.integrity import walk
from stages.registry.sealing import hash_file, hash_files, unseal
from stages.registry.sealing import seal as sealed_json
from stages.registry.storage import fsync_dir, sync_names
from stages.training.ranks import from_rank_0, rank, say, wait_for_everyone, world_size
from stages.training.save_names import ASIDE, FORMER, STAGING, TRASH, is_own, number_of, put_aside, saves

SEAL = "sealed.json"  # in a save: {files: {relative path: [bytes, blake3]}, depends_on, hash}
KEPT = 2  # saves: the newest, and one to fall back to when it is damaged
# The number of the process that wrote a file, where its name holds it: DeepSpeed's shards, the Trainer's random state, ours.
OF_RANK = re.compile(r"(?:rng_state_|zero_pp_rank_|running-|optimizer-)(\d+)")
# How torch.save says that a write failed: a RuntimeError of its archive writer.
TORCH_WRITE = re.compile(r"PytorchStreamWriter|inline_container|iostream|file write failed")


class Failure(NamedTuple):
    """What went wrong on one process: in words, and whether it is the disk (which costs the save) or our own mistake (which ends the run)."""

    words: str
    disk: bool


def attempted(function: Callable[[], Any]) -> Failure | None:
    """Call a function that writes, without collectives in it; what went wrong, if anything."""
    from safetensors import SafetensorError

    try:
        function()
    except (OSError, SafetensorError) as error:
        return Failure(str(error), True)
    except Exception as error:
        if isinstance(error, RuntimeError) and TORCH_WRITE.search(str(error)):
            return Failure("torch.save could not write a file whole: no space left on the device, or the disk fails", True)
        return Failure(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}", False)
    return None


def agreed(failure: Failure | None) -> Failure | None:
    """The first failure of any process, on every process. A collective.

    Raises:
        RuntimeError: on every process, where one failed otherwise than in writing to the disk.
    """
    every: list[Failure | None] = _gathered(failure)
    found = [(number, failed) for number, failed in enumerate(every) if failed is not None]
    for number, failed in found:
        if not failed.disk:
            raise RuntimeError(f"saving failed on rank {number}: {failed.words}")
    if not found:
        return None
    number, failed = found[0]
    return failed if world_size() == 1 else Failure(f"rank {number}: {failed.words}", True)


def on_rank_0(what: str, function: Callable[[], Any]) -> Failure | None:
    """The same for what rank 0 alone does; every process learns what went wrong. A collective."""
    failed: Failure | None = from_rank_0(what, lambda: attempted(function))
    if failed is not None and not failed.disk:
        raise RuntimeError(f"{what}: {failed.words}")
    return failed


def _gathered(value: Any) -> list[Any]:
    if world_size() == 1:
        return [value]
    import torch

    every: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(every, value)
    return every


# -- writing


def store(folder: Path, name: str, write: Callable[[Path], Any], depends_on: Mapping[str, Any], *, keep: Iterable[str] = (), kept: int = KEPT) -> str | None:
    """Make `folder/name` of what `write(staging)` writes on every process, then remove all but the newest `kept` saves and those named in `keep`.

    `write` returns what went wrong (a Failure) or None; it may hold collectives, and then has to catch what fails between them itself.
    Returns why there is no such save, or None when it is there and has been read back. Every process calls this and gets the same.

    Raises:
        RuntimeError: on every process, where `write` failed on one of them otherwise than in writing to the disk.
    """
    staging = folder / f"{STAGING}{name}"
    failed = on_rank_0(f"preparing {name}", lambda: new_staging(folder, name))
    failed = failed or agreed(attempted(lambda: staging.mkdir(parents=True, exist_ok=True)) or write(staging))
    part: dict[str, list[Any]] = {}
    failed = failed or agreed(attempted(lambda: part.update(recorded(staging, rank(), world_size()))))
    if failed is None:
        whole = {file: entry for one in _gathered(part) for file, entry in one.items()}
        failed = on_rank_0(f"sealing {name}", lambda: commit(staging, folder / name, whole, depends_on))
    if failed is not None:
        from_rank_0(f"dropping {staging.name}", lambda: remove_left_overs(folder))
        return failed.words
    failed = agreed(_as_failure(differs(folder / name, part)))

    def conclude() -> None:
        settle(folder, name, sound=failed is None)
        if failed is None:
            rotate(folder, kept, keep)

    on_rank_0(f"settling {name}", conclude)
    return f"it was not read back as it was written: {failed.words}" if failed else None


def store_alone(folder: Path, name: str, write: Callable[[Path], Any], depends_on: Mapping[str, Any] | None = None) -> None:
    """The same for what one process writes by itself, without removing others.

    Raises:
        OSError, SafetensorError, RuntimeError: it could not be written, or was not read back as it was written; nothing of it is left.
    """
    try:
        staging = new_staging(folder, name)
        write(staging)
        files = recorded(staging, 0, 1)
        commit(staging, folder / name, files, depends_on or {})
        why = differs(folder / name, files)
        settle(folder, name, sound=why is None)
        if why is not None:
            raise OSError(f"it was not read back as it was written: {why}")
    finally:
        remove_left_overs(folder)


def _as_failure(why: str | None) -> Failure | None:
    return None if why is None else Failure(why, True)


def new_staging(folder: Path, name: str) -> Path:
    """An empty folder to write into; what earlier attempts left is removed (rank 0). Raises OSError."""
    remove_left_overs(folder)
    folder.mkdir(parents=True, exist_ok=True)
    sync_names(folder)  # else a power cut takes the folder of all saves away, for nothing else in a run syncs the names above it
    staging = folder / f"{STAGING}{name}"
    staging.mkdir()
    return staging


def remove_left_overs(folder: Path) -> None:
    """Remove what was being written or removed when it was cut (rank 0): none of it was ever a save."""
    for left in (*folder.glob(f"{STAGING}*"), *folder.glob(f"{TRASH}*")):
        shutil.rmtree(left, ignore_errors=True)


def recorded(staging: Path, number: int, processes: int) -> dict[str, list[Any]]:
    """Sizes and hashes of the files that process `number` wrote, which are then on the disk for good. Raises OSError."""
    found: dict[str, list[Any]] = {}
    for name, status in walk(staging):
        if name == SEAL or owner(name, processes) != number:
            continue
        found[name] = [status.st_size, hash_file(staging / name)]
        _sync(staging / name)
    return found


def owner(name: str, processes: int) -> int:
    """The number of the process that writes a file of a save: the one in its name, else 0."""
    named = OF_RANK.search(name.rpartition("/")[2])
    return int(named[1]) if named and int(named[1]) < processes else 0


def seal(staging: Path, files: Mapping[str, Any], depends_on: Mapping[str, Any]) -> None:
    """Write the list of a save's files, last. Raises OSError."""
    target = staging / SEAL
    with target.open("wb") as stream:
        stream.write(sealed_json({"files": dict(files), "depends_on": json.loads(json.dumps(depends_on))}))
        stream.flush()
        os.fsync(stream.fileno())


def commit(staging: Path, final: Path, files: Mapping[str, Any], depends_on: Mapping[str, Any]) -> None:
    """Seal what is staged, and rename it now that it is whole (rank 0); one of that name steps aside until the new one has been read back.

    Raises:
        OSError: nothing has been renamed, or the rename may not survive a power cut.
    """
    seal(staging, files, depends_on)
    for inner, _, _ in os.walk(staging):  # those too that hold nothing but folders
        sync_folder(Path(inner))
    former = final.with_name(f"{FORMER}{final.name}")
    if final.exists():
        final.rename(former)
    try:
        staging.rename(final)
        sync_folder(final.parent)
    except OSError:
        with suppress(OSError):
            final.rename(staging)
        with suppress(OSError):
            former.rename(final)
        raise


def differs(save: Path, part: Mapping[str, Any]) -> str | None:
    """What of a save is not on the disk as it was written: its files are read from there, not from the memory that caches them."""
    for name, (size, digest) in part.items():
        try:
            _forget_cached(save / name)
            if (save / name).stat().st_size != size or hash_file(save / name) != digest:
                return f"{name} is damaged"
        except OSError as error:
            return f"{name} can't be read: {error.strerror}"
    return None


def rotate(folder: Path, kept: int, keep: Iterable[str] = ()) -> None:
    """Remove all saves but the newest `kept` and those named in `keep`, and damaged ones that the run has got past (rank 0)."""
    found = saves(folder)
    for old in found[kept:]:
        if old.name not in set(keep):
            retire(old)
    for damaged, number in put_aside(folder):
        if found and number <= number_of(found[0]):
            retire(damaged)


def retire(path: Path) -> None:
    """Remove a folder so that a kill in between leaves no half of it under its name. One that can't be removed stays."""
    trash = path.with_name(f"{TRASH}{path.name}")
    with suppress(OSError):
        path.rename(trash)
        shutil.rmtree(trash, ignore_errors=True)


def set_aside(save: Path) -> Path:
    """Give a save that does not verify another name: it is evidence, and may be all there is."""
    target = save.with_name(f"{ASIDE}{save.name}")
    count = 2
    while target.exists():
        target, count = save.with_name(f"{ASIDE}{save.name}.{count}"), count + 1
    save.rename(target)
    return target


def settle(folder: Path, name: str, *, sound: bool) -> None:
    """Decide between a save and the one of its name that has stepped aside for it (rank 0): a sound one replaces it, another is put aside."""
    former = folder / f"{FORMER}{name}"
    if not sound:
        set_aside(folder / name)
        if former.exists():
            former.rename(folder / name)
    shutil.rmtree(former, ignore_errors=True)


def settle_all(folder: Path) -> None:
    """Finish what a kill has left between a save and the one that it replaces (rank 0)."""
    for former in folder.glob(f"{FORMER}*"):
        final = folder / former.name.removeprefix(FORMER)
        if not final.exists():
            former.rename(final)
        else:
            settle(folder, final.name, sound=problem(final) is None)


# -- finding and judging


def problem(save: Path) -> str | None:
    """Why a save can't be resumed from, or None when every file is as it was written."""
    try:
        listed = read_seal(save)["files"]
        found = {name: status for name, status in walk(save) if name != SEAL}
    except FileNotFoundError:
        return "it was not finished"
    except OSError as error:
        return f"{error.filename or SEAL} can't be read: {error.strerror}"
    except ValueError:
        return f"{SEAL} is damaged"
    if set(found) != set(listed):
        return f"its files differ from its list: {', '.join(sorted(set(found) ^ set(listed))[:3])}"
    for name, (size, _) in listed.items():
        if not stat.S_ISREG(found[name].st_mode) or found[name].st_size != size:
            return f"{name} is damaged"
    hashes = hash_files({save / name: size for name, (size, _) in listed.items()})  # several at once: terabytes of a large model, and all processes wait
    for name, (_, digest) in listed.items():
        read = hashes[save / name]
        if isinstance(read, OSError):
            return f"{name} can't be read: {read.strerror}"
        if read != digest:
            return f"{name} is damaged"
    return None


def read_seal(save: Path) -> dict[str, Any]:
    """A save's list of files and what it depends on ({} where it was made before seals said so). Raises OSError, ValueError."""
    content = (save / SEAL).read_bytes()
    try:
        whole = unseal(content)
    except ValueError:
        try:
            listed = json.loads(content)
        except RecursionError:
            raise ValueError("brackets without end") from None
        if not isinstance(listed, dict) or "hash" in listed or not all(isinstance(entry, list) and len(entry) == 2 for entry in listed.values()):
            raise
        return {"files": listed, "depends_on": {}}
    if not isinstance(whole.get("files"), dict):
        raise ValueError("lists no files")
    return whole


def verified(folder: Path) -> list[Path]:
    """The saves of a run that verify, newest first: rank 0 looks, every process is told. A collective."""
    names = from_rank_0("verifying the saves", lambda: [save.name for save in saves(folder) if problem(save) is None])
    return [folder / name for name in names]


def newest_verified(folder: Path) -> Path | None:
    """The newest save of a run that verifies, or None: rank 0 looks, every process is told. A collective."""
    name = from_rank_0("looking for a sound save", lambda: next((save.name for save in saves(folder) if problem(save) is None), None))
    return folder / name if name else None


def retire_newer(save: Path) -> None:
    """Remove the saves that are newer than one that the run has gone back to. A collective."""

    def remove() -> None:
        for other in saves(save.parent):
            if number_of(other) > number_of(save):
                retire(other)

    from_rank_0("removing newer saves", remove)


def forget(folder: Path) -> None:
    """Remove the saves of a published run; called on every rank. What somebody else put beside them stays."""
    wait_for_everyone()
    if rank() == 0:
        clear(folder)


def clear(folder: Path) -> None:
    """Remove what a run has made in the folder of its saves, and the folder where nothing else lies in it (rank 0)."""
    entries = list(folder.iterdir()) if folder.is_dir() else []
    foreign = sorted(path.name for path in entries if not is_own(path.name))
    if foreign:
        for path in entries:
            if path.name not in foreign:
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        say(f"{folder}: the run is published and its saves are removed; what is not its own stays there: {', '.join(foreign[:5])}{' …' if foreign[5:] else ''}")
    else:
        shutil.rmtree(folder, ignore_errors=True)


# -- what is said of saves that failed


class Warnings:
    """Says once that saves fail, and once that they work again."""

    def __init__(self, stage: str) -> None:
        self.stage, self.failed = stage, 0

    def outcome(self, what: str, why: str | None, last: str | None = None) -> bool:
        """Note how a save went, and whether it is there; rank 0 says it where that is news. `last` names the newest save that is sound."""
        if why is None:
            if self.failed:
                say(f"{self.stage}: {what} is written; {self.failed} before it could not be")
            self.failed = 0
            return True
        if not self.failed:
            held = f"{last} stays the one to resume from" if last else "there is no save to resume from yet"
            say(
                f"warning: {self.stage}: {what} could not be written ({why}); training goes on and {held}. Make room: every save that is due is tried "
                "again, and nothing more is said until one succeeds"
            )
        self.failed += 1
        return False


# -- the disk


def write_durably(file: Path, text: str) -> None:
    """Write a file so that after a crash it holds either all of the text or what it held before."""
    staging = file.with_name(f".{file.name}.{os.getpid()}")
    with staging.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    staging.replace(file)


def _sync(file: Path) -> None:
    with file.open("rb") as stream:
        os.fsync(stream.fileno())


def sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power cut."""
    try:
        fsync_dir(folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.ENOSYS):  # some SMB and FUSE mounts sync no folders; better such a save than none
            raise


def _forget_cached(file: Path) -> None:
    """Have the system drop what it caches of a file that is on the disk, where it can be told so."""
    if not hasattr(os, "posix_fadvise"):
        return
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)

