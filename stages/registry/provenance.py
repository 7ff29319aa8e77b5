"""Where a checkpoint came from: the version of this code, of the libraries, and the machine. Imports no library."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

LIBRARIES = (
    "torch", "transformers", "trl", "peft", "accelerate", "datasets", "tokenizers", "safetensors", "numpy",
    "pydantic", "blake3", "deepspeed", "bitsandbytes",
)  # fmt: skip
PROJECT = Path(__file__).resolve().parents[2]


def code_version(project: Path = PROJECT) -> dict[str, Any]:
    """{"version", "git", "dirty"}: the last two only in a git checkout of this project."""
    try:
        version = metadata.version("align-stack")
    except metadata.PackageNotFoundError:
        version = "unknown"
    if not (project / ".git").exists():
        return {"version": version}
    sha, changes = _git(project, "rev-parse", "HEAD"), _git(project, "status", "--porcelain")
    if sha is None or changes is None:
        return {"version": version}
    return {"version": version, "git": sha, "dirty": bool(changes)}


def _git(project: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", "-C", str(project), *arguments], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def library_versions() -> dict[str, str]:
    """Installed versions of the libraries that decide what a checkpoint holds."""
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def hardware() -> dict[str, Any]:
    """Platform and processors; the accelerators when torch is loaded anyway."""
    facts: dict[str, Any] = {
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpu_count": os.cpu_count(),
    }
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        facts["accelerators"] = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return facts


def provenance() -> dict[str, Any]:
    """All of the above, as the manifest records it."""
    return {
        "code": code_version(),
        "libraries": library_versions(),
        "python": platform.python_version(),
        "hardware": hardware(),
    }
