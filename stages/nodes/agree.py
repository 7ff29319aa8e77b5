"""What all nodes must have in common: the config, the folders they share, and what was published."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from configs.errors import UserError
from stages.nodes.place import first_rank, local_rank, node_count, node_rank

SEEN_WITHIN = 30.0  # seconds until a file that one node wrote must be there on another; NFS keeps what it knows of a folder that long


def gathered(value: Any) -> list[Any]:
    """`value` of the first process of each node, in order, on every process."""
    from accelerate.utils import gather_object

    everyone = gather_object([value])
    return [everyone[first_rank(node)] for node in range(node_count())]


def same_config(load: Callable[[], Any]) -> Any:
    """This node's config as `load` reads it, once it is known to be the same on every node.

    Raises:
        UserError: on every process: a node can't read its config, or reads another than node 0.
    """
    if node_count() == 1:
        return load()
    cfg, problem = None, ""
    try:
        cfg = load()
    except UserError as error:
        problem = str(error)
    told = gathered((problem, cfg.model_dump(mode="json") if cfg is not None else None))
    for node, (wrong, _) in enumerate(told):
        if wrong:
            raise UserError(wrong if node == 0 else f"node {node}: {wrong}")
    for node, (_, theirs) in enumerate(told):
        if differences := different(told[0][1], theirs):
            raise UserError(
                f"node {node} has another config than node 0: {'; '.join(differences)} (node 0's value first). "
                "Give every node the same file, best one on a folder that all of them share, and the same key=value"
            )
    return cfg


def different(first: Any, second: Any, where: str = "") -> list[str]:
    """Where two resolved configs differ: `train.epochs: 1.0, 2.0`."""
    if isinstance(first, dict) and isinstance(second, dict):
        keys = [*first, *(key for key in second if key not in first)]
        return [line for key in keys for line in different(first.get(key), second.get(key), f"{where}.{key}" if where else str(key))]
    return [] if first == second else [f"{where}: {first!r}, {second!r}"]


def check_shared(folders: Mapping[str, Path]) -> None:
    """Make sure that every node sees in each folder (by its config key) what node 0 writes there; node 0 makes those that are missing.

    Raises:
        UserError: on every process: a node sees another folder under that path, or none.
    """
    if node_count() == 1:
        return
    from stages.training.ranks import from_rank_0, wait_for_everyone

    def write() -> dict[str, str]:
        names = {}
        for key, folder in folders.items():
            folder.mkdir(parents=True, exist_ok=True)
            names[key] = f".seen-{secrets.token_hex(8)}"
            (folder / names[key]).write_text(names[key], encoding="utf-8")
        return names

    names = from_rank_0("writing where every node should see it", write)
    missing = [key for key, folder in folders.items() if local_rank() == 0 and not appears(folder / names[key], names[key])]
    problems = [
        f"node {node} does not see in {key} ({Path(path)}) what node 0 wrote there"
        for node, keys in enumerate(gathered([(key, str(folders[key].absolute())) for key in missing]))
        for key, path in keys
    ]
    wait_for_everyone()
    if node_rank() == 0 and local_rank() == 0:
        for key, folder in folders.items():
            (folder / names[key]).unlink(missing_ok=True)
    if problems:
        raise UserError(f"{'; '.join(problems)}. Give a folder on a file system that all nodes share, under the same path on each of them")


def appears(file: Path, content: str) -> bool:
    """Whether a file with this content is there, or comes within SEEN_WITHIN seconds."""
    until = time.monotonic() + float(os.environ.get("ALIGN_SHARED_TIMEOUT", SEEN_WITHIN))
    while True:
        try:
            os.listdir(file.parent)  # has a network file system look again
            if file.read_text(encoding="utf-8") == content:
                return True
        except OSError:
            pass
        if time.monotonic() >= until:
            return False
        time.sleep(0.1)


def check_same_models(folders: Iterable[str]) -> None:
    """Make sure that the model folders hold the same files on every node, by names and sizes and the content of config.json.

    Hub names, which are folders on no node, are left to the hub.

    Raises:
        UserError: on every process: a node has others, or none.
    """
    if node_count() == 1:
        return
    mine = {folder: signature(Path(folder)) for folder in folders} if local_rank() == 0 else {}
    told = gathered(mine)
    for node, theirs in enumerate(told):
        for folder, found in theirs.items():
            if found != told[0][folder]:
                what = f"is not there on node {node}" if found is None else f"holds other files on node {node} than on node 0"
                raise UserError(f"the model folder {folder} {what}: copy it there, or put it on a file system that all nodes share")


def signature(folder: Path) -> list[Any] | None:
    """Names and sizes of a folder's files and the content of its config.json; None where there is no such folder."""
    if not folder.is_dir():
        return None
    files = sorted((path.name, path.stat().st_size) for path in folder.iterdir() if path.is_file())
    config = folder / "config.json"
    return [files, config.read_text(encoding="utf-8") if config.is_file() else ""]


def check_published(registry: Path, ref: str, checkpoint_id: str) -> None:
    """Make sure that every node sees a checkpoint that node 0 has published.

    Raises:
        UserError: on every process: one does not.
    """
    if node_count() == 1:
        return
    from stages.registry import Registry

    def problem() -> str:
        until = time.monotonic() + SEEN_WITHIN
        while True:
            try:
                Registry(registry, create=False).resolve(checkpoint_id)
                return ""
            except UserError as error:
                if time.monotonic() >= until:
                    return str(error)
            time.sleep(0.1)

    told = gathered(problem() if local_rank() == 0 else "")
    for node, wrong in enumerate(told):
        if wrong:
            raise UserError(f"{ref} is published in {registry}, but node {node} does not see it whole: {wrong}")
