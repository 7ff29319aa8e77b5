"""The rules of the layout and of the code: who may import whom, what is light, what is read, what is clean."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from configs.load import MODELS
from configs.problems import models_in
from configs.schema.chain import STAGES

ROOT = Path(__file__).parents[2]
PACKAGES = ("stages", "rewards", "configs", "launch")
MAY_IMPORT = {
    "configs": {"configs"},
    "rewards": {"rewards", "configs"},
    "stages": {"stages", "rewards", "configs"},
    "launch": set(PACKAGES),
}
ENTRY_POINTS = ("sft", "reward", "dpo", "ppo")
HEAVY = {"torch", "transformers", "trl", "peft", "accelerate", "datasets", "numpy", "rich", "matplotlib"}
MAX_LINES, MAX_FUNCTION = 450, 70


@cache
def tracked() -> tuple[Path, ...]:
    """Files of the project: those git tracks or would, or all of them where there is no git (an unpacked archive)."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode == 0:
        return tuple(sorted(ROOT / line for line in listed.stdout.splitlines() if (ROOT / line).is_file()))
    skipped = {".venv", "runs", "__pycache__", "build", "dist"}
    return tuple(sorted(p for p in ROOT.rglob("*") if p.is_file() and not skipped & set(p.relative_to(ROOT).parts)))


def sources(*packages: str) -> list[Path]:
    return [path for path in tracked() if path.suffix == ".py" and path.relative_to(ROOT).parts[0] in packages]


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(path: Path) -> list[str]:
    """Every module a file imports, anywhere in it; `from a import b` counts as a.b too, since b may be a module."""
    found = []
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = ".".join(path.relative_to(ROOT).parts[:-1][: len(path.relative_to(ROOT).parts) - node.level]) if node.level else ""
            base = ".".join(part for part in (package, node.module or "") if part)
            found += [base, *(f"{base}.{alias.name}" for alias in node.names)]
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_import_directions(package):
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources(package)
        for name in imports(path)
        if name.split(".")[0] in {*PACKAGES, "tests"} - MAY_IMPORT[package]
    ]
    assert not wrong, "\n".join(wrong)


def test_entry_points_never_import_one_another():
    wrong = []
    for entry in ENTRY_POINTS:
        files = [p for p in sources("stages") if p == ROOT / "stages" / f"{entry}.py" or ROOT / "stages" / entry in p.parents]
        others = tuple(f"stages.{other}" for other in ENTRY_POINTS if other != entry)
        wrong += [f"{p.relative_to(ROOT)} imports {n}" for p in files for n in imports(p) if n in others or n.startswith(tuple(o + "." for o in others))]
    assert not wrong, "\n".join(wrong)


def test_what_stages_share_imports_no_entry_point():
    entries = ("stages.sft", "stages.reward", "stages.dpo", "stages.ppo.train", "stages.ppo.__main__")
    wrong = []
    for path in sources("stages"):
        place = path.relative_to(ROOT / "stages").parts[0].removesuffix(".py")
        if place not in ENTRY_POINTS:
            wrong += [f"{path.relative_to(ROOT)} imports {n}" for n in imports(path) if n in entries or n.startswith(tuple(e + "." for e in entries))]
    assert not wrong, "\n".join(wrong)


def light_modules() -> list[str]:
    """Modules that must load in milliseconds."""
    files = [p for p in sources("configs") if p.name != "__init__.py"]
    files += [p for p in sources("stages") if p.parent == ROOT / "stages" / "registry" and p.name != "__init__.py"]
    files += [p for p in sources("launch") if p.name == "cli.py" or p.name.endswith("_cli.py")]
    return [".".join(p.relative_to(ROOT).with_suffix("").parts) for p in files]


def test_light_modules_import_nothing_heavy():
    modules = light_modules()
    assert "launch.cli" in modules
    code = f"import importlib, sys\nfor m in {modules!r}:\n    importlib.import_module(m)\n    bad = {HEAVY!r} & set(sys.modules)\n    assert not bad, f'{{m}} imports {{sorted(bad)}}'"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("words", [["--help"], ["config", "--help"], ["sft", "--help"]])
def test_help_imports_neither_pydantic_nor_yaml(words):
    code = f"import sys\nfrom launch.cli import main\ntry:\n    main({words!r})\nexcept SystemExit:\n    pass\nassert not {HEAVY | {'pydantic', 'yaml'}!r} & set(sys.modules), sorted(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def schema_fields() -> dict[str, set[str]]:
    """Field -> the models that have it."""
    fields: dict[str, set[str]] = {}
    seen: set[type] = set()

    def walk(model: type) -> None:
        if model in seen:
            return
        seen.add(model)
        for name, field in model.model_fields.items():  # type: ignore[attr-defined]
            fields.setdefault(name, set()).add(model.__name__)
            for below in models_in(field.annotation):
                walk(below)

    for model in MODELS.values():
        walk(model)
    return fields


def test_every_field_of_the_schema_is_read():
    """A setting nobody reads is a lie to the user. Read means: some code outside configs/schema takes the attribute `.field`.

    A name that several models share counts as read once for all of them: what this test cannot tell apart it does not claim.
    """
    read: set[str] = set()
    for path in sources("stages", "rewards", "launch", "configs"):
        if ROOT / "configs" in path.parents and path.name not in ("overrides.py", "machines.py", "presets.py"):
            continue
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                read.add(node.attr)
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr" and len(node.args) > 1 and isinstance(node.args[1], ast.Constant):
                read.add(str(node.args[1].value))
    read |= {"assets"}  # configs.overrides reads every top-level key by the name in ${…}; this one exists for nothing else
    read |= {"tune"}  # the property `technique` of an SFT config reads it, and everybody reads that
    read |= set(STAGES)  # the chain takes its sections as getattr(chain, stage), tested by running chains
    unread = {name: sorted(models) for name, models in schema_fields().items() if name not in read}
    assert not unread, "\n".join(f"{name} of {', '.join(models)}" for name, models in unread.items())


def test_files_are_short():
    long = {str(p.relative_to(ROOT)): n for p in sources(*PACKAGES) if (n := len(p.read_text(encoding="utf-8").splitlines())) > MAX_LINES}
    assert long == {}


def test_functions_are_short():
    long = {
        f"{path.relative_to(ROOT)}:{node.name}": node.end_lineno - node.lineno + 1
        for path in sources(*PACKAGES)
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (node.end_lineno or 0) - node.lineno + 1 > MAX_FUNCTION
    }
    assert long == {}


def test_no_file_is_named_utils_or_core():
    assert [str(p.relative_to(ROOT)) for p in sources(*PACKAGES) if p.stem in ("utils", "core", "helpers", "misc", "common_utils")] == []


def test_every_module_says_what_it_is_for():
    assert [str(p.relative_to(ROOT)) for p in sources(*PACKAGES) if p.name != "__init__.py" and not ast.get_docstring(tree_of(p))] == []


MACHINE_PATH = re.compile(r"(?<![\w.])/(?:home|Users|root|work|mnt|scratch)/[\w.-]+")
UNFINISHED = re.compile(r"\b(?:" + "|".join(("TO" + "DO", "FIX" + "ME", "XX" + "X")) + r")\b")


def test_no_paths_of_a_machine_and_nothing_unfinished():
    wrong = []
    for path in tracked():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(text.splitlines(), 1):
            if MACHINE_PATH.search(line) or UNFINISHED.search(line):
                wrong.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert not wrong, "\n".join(wrong)


def test_nothing_is_skipped():
    """A test that is skipped says nothing; the project has none."""
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in sources("tests")
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("pytest.skip", "pytest.mark.skip", "pytest.mark.xfail", "pytest.mark.skipif", "pytest.importorskip")
    ]
    assert not wrong, "\n".join(wrong)


def test_ruff():
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "--no-cache", "."], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_mypy():
    done = subprocess.run([sys.executable, "-m", "mypy"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
