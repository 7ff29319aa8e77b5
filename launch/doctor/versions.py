"""Versions: Python, the libraries and this project, against the ranges that pyproject.toml states."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from launch.doctor.check import Findings, Settings

PROJECT = "align-stack"
SHOWN = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "tokenizers", "safetensors", "numpy", "pydantic")
SOURCE = Path(__file__).resolve().parents[2] / "pyproject.toml"


def requirements(pyproject: Path = SOURCE) -> tuple[str, dict[str, str], dict[str, tuple[str, str]]]:
    """(range of Python, package -> range, optional package -> (range, the extra that brings it)), from the checkout or the installed metadata."""
    from packaging.requirements import Requirement

    if pyproject.is_file():
        import tomllib

        project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
        needed = [(text, "") for text in project["dependencies"]]
        needed += [(text, extra) for extra, texts in project.get("optional-dependencies", {}).items() for text in texts]
        python = project["requires-python"]
    else:
        facts = metadata.metadata(PROJECT)
        python = facts["Requires-Python"]
        needed = []
        for text in metadata.requires(PROJECT) or []:
            line, _, marker = text.partition(";")
            needed.append((line.strip(), marker.split("==")[1].strip(" '\"") if "extra ==" in marker else ""))
    required, optional = {}, {}
    for text, extra in needed:
        requirement = Requirement(text)
        if not extra:
            required[requirement.name] = str(requirement.specifier)
        elif extra != "dev":
            optional[requirement.name] = (str(requirement.specifier), extra)
    return python, required, optional


def installed(name: str) -> str | None:
    """The installed version of a package, None where there is none."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def check_versions(_: Settings) -> Findings:
    """Which versions there are, and which are outside of the supported range."""
    from packaging.specifiers import SpecifierSet

    from stages.registry.provenance import code_version

    found = Findings()
    python, required, optional = requirements()
    code = code_version()
    sha = f" {code['git'][:12]}{' with uncommitted changes' if code['dirty'] else ''}" if "git" in code else ""
    rows: dict[str, Any] = {PROJECT: f"{code['version']}{sha}", "python": f"{platform.python_version()} (supported: {python})"}
    if not SpecifierSet(python).contains(platform.python_version(), prereleases=True):
        found.fail(f"Python {platform.python_version()}, supported is {python}", "make an environment with a Python of that range and install again")
    for name, supported in required.items():
        _one(found, rows, name, supported, None)
    for name, (supported, extra) in optional.items():
        _one(found, rows, name, supported, extra)
    for name in SHOWN:
        rows.setdefault(name, installed(name) or "missing")
    rows["platform"] = platform.platform()
    found.facts = rows
    found.summary = f"{PROJECT} {code['version']}, Python {platform.python_version()}, " + ", ".join(
        f"{name} {installed(name) or 'missing'}" for name in ("torch", "transformers", "trl")
    )
    return found


def _one(found: Findings, rows: dict[str, Any], name: str, supported: str, extra: str | None) -> None:
    from packaging.specifiers import SpecifierSet

    version = installed(name)
    if version is None:
        rows[name] = f"not installed (optional: pip install 'align-stack[{extra}]')" if extra else "missing"
        if extra is None:
            found.fail(f"{name} is not installed, {name}{supported} is needed", f"pip install '{name}{supported}'")
        return
    rows[name] = f"{version} (supported: {supported})" if supported else version
    if supported and not SpecifierSet(supported).contains(version, prereleases=True):
        level = found.warn if extra else found.fail
        level(f"{name} {version} is outside of the supported range {supported}", f"pip install '{name}{supported}'")
