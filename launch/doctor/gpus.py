"""NVIDIA GPUs as the driver tells them, and the wires between them."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

from launch.doctor.check import Findings, Settings

FIELDS = ("index", "name", "driver_version", "memory.total", "memory.used", "compute_cap")
BUSY_MIB = 2048


class DriverError(RuntimeError):
    """nvidia-smi is there and does not work."""


def nvidia_smi(*arguments: str) -> str | None:
    """What nvidia-smi prints; None where it is not installed. Raises DriverError when it fails."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=30, check=False)
    if done.returncode:
        raise DriverError((done.stderr or done.stdout).strip().splitlines()[0] if (done.stderr or done.stdout).strip() else f"code {done.returncode}")
    return done.stdout


def list_gpus() -> list[dict[str, Any]]:
    """One row per GPU: index, name, driver, memory in MiB, compute capability. Empty where there is no driver. Raises DriverError."""
    text = nvidia_smi(f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader,nounits")
    rows = []
    for line in (text or "").strip().splitlines():
        index, name, driver, total, used, capability = (cell.strip() for cell in line.split(","))
        rows.append({"index": int(index), "name": name, "driver": driver, "memory [MiB]": _number(total), "used [MiB]": _number(used), "compute capability": capability})
    return rows


def _number(text: str) -> int | None:
    return int(float(text)) if re.fullmatch(r"[\d.]+", text) else None


def topology(text: str) -> dict[str, str]:
    """`nvidia-smi topo -m` as {"GPU0-GPU1": "NV12", …}: how each pair of GPUs is joined."""
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).split() for line in text.splitlines() if line.strip()]
    heads = next((line for line in lines if line and line[0] == "GPU0" and not any(cell == "X" for cell in line)), [])
    columns = [cell for cell in heads if re.fullmatch(r"GPU\d+", cell)]
    pairs: dict[str, str] = {}
    for line in lines:
        if re.fullmatch(r"GPU\d+", line[0]) and len(line) > len(columns) and line is not heads:
            row = int(line[0][3:])
            pairs |= {f"{line[0]}-{name}": kind for name, kind in zip(columns, line[1:], strict=False) if int(name[3:]) > row}
    return pairs


def check_gpus(_: Settings) -> Findings:
    """GPUs, driver, memory, what else uses them."""
    found = Findings()
    devices = [path.name for path in Path("/dev").glob("nvidia[0-9]*")]
    try:
        rows = list_gpus()
    except DriverError as error:
        found.fail(f"nvidia-smi fails: {error}", "the driver is broken or not loaded: reboot, or install the driver again")
        return found
    found.facts = {"gpus": rows}
    if not rows:
        found.summary = "no NVIDIA GPU: stages run on the CPU"
        if devices:
            found.fail(f"/dev has {', '.join(devices)}, but there is no nvidia-smi", "start the container with the driver's tools (docker: --gpus all)")
        return found
    names = sorted({row["name"] for row in rows})
    found.summary = f"{len(rows)} × {' / '.join(names)}, {(rows[0]['memory [MiB]'] or 0) / 1024:.0f} GiB each, driver {rows[0]['driver']}"
    if len(names) > 1:
        found.warn(f"GPUs of several kinds: {', '.join(names)}", "the slowest sets the pace; choose equal ones with CUDA_VISIBLE_DEVICES")
    busy = [f"{row['index']} ({row['used [MiB]']} MiB)" for row in rows if (row["used [MiB]"] or 0) > BUSY_MIB]
    if busy:
        found.warn(f"memory of GPU {', '.join(busy)} is in use by other processes", "see nvidia-smi; end them or choose other GPUs with CUDA_VISIBLE_DEVICES")
    return found
