"""Two "machines" on this one: two network namespaces joined by a cable (veth) with private addresses, where the kernel allows it."""

from __future__ import annotations

import subprocess
import time
from contextlib import ExitStack
from dataclasses import dataclass

ADDRESSES = ("10.213.7.1", "10.213.7.2")
LIFE = "900"  # seconds until a namespace ends, should the tests be killed


@dataclass
class TwoMachines:
    """How to run a command on each (`prefixes`), under which address node 0 is reached, and what this is, in words."""

    prefixes: tuple[list[str], list[str]]
    address: str
    says: str


def inside(pid: int) -> list[str]:
    """The words before a command that is to run in a process's user and network namespaces."""
    return ["nsenter", "-t", str(pid), "-U", "-n", "--preserve-credentials"]


def two_machines(stack: ExitStack) -> TwoMachines:
    """Two namespaces, ended with `stack`; else twice this machine, under its loopback address."""
    try:
        return _namespaces(stack)
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", b"") or str(error).encode()
        why = (detail.decode(errors="replace").strip().splitlines() or [type(error).__name__])[-1]
        return TwoMachines(([], []), "127.0.0.1", f"NO network namespaces here ({why}); both nodes are 127.0.0.1 instead, so no address, name or interface differs")


def _namespaces(stack: ExitStack) -> TwoMachines:
    def hold(*words: str) -> int:
        process = subprocess.Popen([*words, "sleep", LIFE], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        stack.callback(process.wait)
        stack.callback(process.kill)
        until = time.monotonic() + 5
        while time.monotonic() < until:  # until it has become `sleep`, in its namespaces
            if process.poll() is not None:
                raise OSError(process.stderr.read().decode() if process.stderr else "unshare failed")
            with open(f"/proc/{process.pid}/cmdline", "rb") as file:
                if file.read().startswith(b"sleep"):
                    return process.pid
            time.sleep(0.02)
        raise OSError("unshare did not come back")

    first = hold("unshare", "--user", "--map-root-user", "--net")
    second = hold("nsenter", "-t", str(first), "-U", "--preserve-credentials", "unshare", "--net")

    def ip(pid: int, words: str) -> None:
        subprocess.run([*inside(pid), "ip", *words.split()], check=True, capture_output=True, timeout=20)

    ip(first, f"link add cable0 type veth peer name cable1 netns {second}")
    for pid, device, address in ((first, "cable0", ADDRESSES[0]), (second, "cable1", ADDRESSES[1])):
        ip(pid, f"addr add {address}/24 dev {device}")
        ip(pid, "link set lo up")
        ip(pid, f"link set {device} up")
    return TwoMachines((inside(first), inside(second)), ADDRESSES[0], f"two network namespaces, {ADDRESSES[0]} and {ADDRESSES[1]}")
