"""Processes of this machine, as Linux's /proc shows them: which is which, when it started, what it was started with, what it does."""

from __future__ import annotations

import os
from pathlib import Path

PROC = Path("/proc")


def boot_id() -> str:
    """A name of this start of the kernel, 36 characters; "" where the system has none (not Linux)."""
    try:
        return (PROC / "sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def pid_space() -> int:
    """Inode of the PID namespace that process ids are counted in: a container's is its own. 0 where that can't be told."""
    try:
        return os.stat(PROC / "self/ns/pid").st_ino
    except OSError:
        return 0


def start_time(pid: int) -> int | None:
    """When a process started, in clock ticks after boot; None when there is none, or only its exit code is left (a zombie).

    With the boot it tells a process from a later one that got the same number. Without /proc: hundredths of a second of the system's clock.
    """
    try:
        fields = (PROC / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()  # the name in parentheses may hold blanks
    except OSError:
        return None if (PROC / "self/stat").exists() else _start_time_without_proc(pid)
    return None if fields[0] in ("Z", "X", "x") else int(fields[19])


def _start_time_without_proc(pid: int) -> int | None:
    import psutil

    try:
        return int(psutil.Process(pid).create_time() * 100)
    except psutil.Error:
        return None


def children(pid: int) -> list[int]:
    """Process ids of a process's children; empty where it has gone, or where there is no /proc."""
    out: list[int] = []
    for thread in (PROC / str(pid) / "task").glob("*/children"):
        try:
            out += map(int, thread.read_text().split())
        except OSError:
            continue
    return out


def environment(pid: int) -> dict[str, str]:
    """The variables that a process of this user was started with; empty where they can't be read."""
    try:
        entries = (PROC / str(pid) / "environ").read_bytes().split(b"\0")
    except OSError:
        return {}
    return dict(entry.decode(errors="replace").split("=", 1) for entry in entries if b"=" in entry)


def state(pid: int) -> str:
    """What the kernel says a process does, such as "S (sleeping)" or "T (stopped)"; empty where it has gone."""
    try:
        lines = (PROC / str(pid) / "status").read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("State:")), "")
