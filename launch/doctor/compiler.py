"""The C++ compiler with which DeepSpeed builds its operators at the first start."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
import tempfile
from importlib.util import find_spec
from pathlib import Path

from launch.doctor.check import Findings, Settings

PROGRAM = "#include <string>\n#include <vector>\nextern \"C\" int answer() { std::vector<std::string> words{\"a\"}; return 41 + static_cast<int>(words.size()); }\n"
PACKAGES = "Debian and Ubuntu: apt install g++ ninja-build python3-dev; conda: gxx ninja"


def check_compiler(settings: Settings) -> Findings:
    """Is there a compiler, does it build a shared library, are Ninja and Python's headers there. All of it matters to DeepSpeed only."""
    found = Findings()
    program = shutil.which(os.environ.get("CXX") or "g++") or shutil.which("c++") or shutil.which("clang++")
    ninja = shutil.which("ninja") or (find_spec("ninja") and "the package ninja")
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    nvcc = shutil.which("nvcc") or (os.environ.get("CUDA_HOME") and shutil.which("nvcc", path=f"{os.environ['CUDA_HOME']}/bin"))
    deepspeed = find_spec("deepspeed") is not None
    found.facts = {"compiler": program, "ninja": ninja or None, "Python headers": headers.is_file(), "nvcc": nvcc or None, "deepspeed installed": deepspeed}
    if program is None:
        found.warn("no C++ compiler: DeepSpeed cannot build its operators (ZeRO on CPUs, offloaded optimizers)", PACKAGES)
        found.summary = "none"
        return found
    version = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=20, check=False).stdout.splitlines()
    found.facts["version"] = version[0] if version else "?"
    if not settings.quick and (problem := compile_problem(program)):
        found.warn(f"{Path(program).name} does not compile a shared library: {problem}", PACKAGES)
    if not ninja:
        found.warn("no Ninja: DeepSpeed's operators need it to build", "pip install ninja")
    if not headers.is_file():
        found.warn("Python.h is missing: DeepSpeed's operators need it to build", PACKAGES)
    found.summary = f"{Path(program).name}, {'Ninja' if ninja else 'no Ninja'}, {'DeepSpeed is installed' if deepspeed else 'DeepSpeed is not installed'}"
    return found


def compile_problem(program: str) -> str | None:
    """What the compiler says about a ten-line C++17 library; None when it builds and answers right."""
    import ctypes

    with tempfile.TemporaryDirectory(prefix="align-doctor-") as folder:
        source, library = Path(folder) / "answer.cpp", Path(folder) / "answer.so"
        source.write_text(PROGRAM)
        done = subprocess.run([program, "-std=c++17", "-O1", "-shared", "-fPIC", "-o", str(library), str(source)], capture_output=True, text=True, timeout=60, check=False)
        if done.returncode:
            return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[0]
        return None if ctypes.CDLL(str(library)).answer() == 42 else "the library answers wrongly"
