"""What a step's result depends on, as digests: config, parents, data and code. Equal inputs need no second run."""

from __future__ import annotations

import ast
import functools
import importlib.util
import json
from collections.abc import Iterable, Set
from pathlib import Path
from typing import Any

# Where things and models lie, how many processes work on them and what is warned of changes no result (bar rounding).
IGNORED = frozenset({"output", "registry", "machine", "processes", "allow_changed", "health", "guard", "offload_frozen", "watchdog", "keep_resume"})
# Keys whose values may name a file or folder whose content counts.
FILE_KEYS = frozenset({"path", "test_prompts", "template", "init_from", "reference", "value_init", "checkpoint", "checkpoints", "plain_text", "general_prompts"})
# What reads configs, stores results, and ends or watches processes decides nothing about them: a clearer error message is no reason to train again.
NOT_COUNTED = ("configs", "stages.registry", "stages.training.stop", "stages.training.watchdog", "stages.training.hang", "stages.training.siblings")
ROOT = Path(__file__).resolve().parents[2]


def digest(value: Any) -> str:
    """blake3 of a JSON value's canonical text."""
    from stages.registry.sealing import canonical, hash_bytes

    return hash_bytes(canonical(json.loads(json.dumps(value, default=str))))


def path_digest(path: Path) -> str:
    """blake3 of a file, or of a folder's files with their relative names; "absent" where there is nothing."""
    from stages.registry.manifest import folder_digest
    from stages.registry.sealing import hash_file

    if path.is_file():
        return hash_file(path)
    return folder_digest(path) if path.is_dir() else "absent"


def without_ignored(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a resolved config that decides what comes out."""
    return {key: value for key, value in config.items() if key not in IGNORED}


def named(value: Any, keys: Set[str], key: str = "") -> Iterable[str]:
    """Every text in a config that stands under one of `keys`, in order."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from named(inner, keys, name)
    elif isinstance(value, list):
        for inner in value:
            yield from named(inner, keys, key)
    elif isinstance(value, str) and key in keys:
        yield value


def data_digest(config: dict[str, Any]) -> str:
    """Digest of the content of every file and folder that a config names, and of the user's functions in it."""
    present = [name for name in named(config, FILE_KEYS) if Path(name).exists()]
    functions = [name for name in named(config, {"function"}) if ":" in name]
    return digest([*([n, path_digest(Path(n))] for n in present), *([n, code_digest(n.partition(":")[0])] for n in functions)])


def code_digest(module: str) -> str:
    """Digest of a module's source and of every module of this project that it imports, directly or not."""
    return digest(code_files(module))


def code_files(module: str) -> dict[str, str]:
    """Module -> digest of its source, for a module and what it imports of this project (or of its own package)."""
    seen: dict[str, str] = {}
    waiting = [module, f"{module}.__main__"]
    while waiting:
        name = waiting.pop()
        source = _source(name)
        if name in seen or source is None or any(name == skip or name.startswith(f"{skip}.") for skip in NOT_COUNTED):
            continue
        stat = source.stat()
        seen[name], imported = _read_source(name, source, stat.st_mtime_ns, stat.st_size)
        waiting += imported
    return seen


@functools.lru_cache(maxsize=4096)
def _read_source(name: str, source: Path, _changed: int, _size: int) -> tuple[str, list[str]]:
    """A module's digest and imports; read again once the file has changed."""
    return path_digest(source), _imports(name, source)


def _source(name: str) -> Path | None:
    """The file of a module, looked for without importing it where it is ours; None where it is not found or not Python."""
    base = ROOT.joinpath(*name.split("."))
    for candidate in (base.with_suffix(".py"), base / "__init__.py"):
        if candidate.is_file():
            return candidate
    if name.split(".")[0] in ("stages", "rewards", "configs", "launch"):
        return None
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None
    return Path(spec.origin) if spec and spec.origin and spec.origin.endswith(".py") else None


def _imports(name: str, source: Path) -> list[str]:
    """Names of modules beside `source` or in this project that it imports, its package included."""
    package = name if source.name == "__init__.py" else name.rpartition(".")[0]
    ours = {"stages", "rewards", "configs", "launch"} | ({name.split(".")[0]} if "." in name else set())
    found = [package]
    for node in ast.walk(ast.parse(source.read_bytes())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            head = importlib.util.resolve_name("." * node.level + (node.module or ""), package) if node.level else node.module or ""
            found += [head, *(f"{head}.{alias.name}" for alias in node.names)]
    return [each for each in found if each.split(".")[0] in ours]


def inputs_key(parts: dict[str, Any]) -> str:
    """The key that a stage stores in its manifest as info["inputs_key"]."""
    return digest(parts)


def what_changed(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Which kinds of input differ, for a person."""
    changed = [kind for kind in new if old.get(kind) != new[kind]]
    return ", ".join(changed) or "nothing"
