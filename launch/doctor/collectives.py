"""Two processes over gloo, and one per GPU over NCCL: do they meet, and do they add up right."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from launch.doctor.check import Findings, Settings
from launch.doctor.child import environment, last_words
from launch.doctor.gpus import DriverError, list_gpus

MEETING_SECONDS = 60.0  # in which the processes must have met; importing torch on a busy machine is most of it
ADVICE = {
    "gloo": "a firewall on loopback, GLOO_SOCKET_IFNAME naming a missing interface, or a machine name that does not resolve: see `interconnect`",
    "nccl": "run again with NCCL_DEBUG=INFO; try NCCL_P2P_DISABLE=1 and NCCL_IB_DISABLE=1 to find the link that fails; see `shared memory`",
}
Starter = Callable[[int], Sequence[str]]


def check_gloo(_: Settings) -> Findings:
    """Two processes over gloo."""
    return collective("gloo", 2)


def check_nccl(_: Settings) -> Findings:
    """One process per GPU, at most eight, over NCCL."""
    try:
        gpus = list_gpus()
    except DriverError:
        gpus = []
    if not gpus:
        found = Findings(summary="no GPU, so no NCCL")
        return found
    return collective("nccl", min(len(gpus), 8))


def collective(backend: str, world: int, starter: Starter | None = None, seconds: float = MEETING_SECONDS, grace: float = 20.0) -> Findings:
    """Start `world` processes that meet and all-reduce, and judge what they answer. `starter(rank)`: another command, for tests."""
    found = Findings()
    port = _free_port()
    if starter is None:
        options = ["--world", str(world), "--port", str(port), "--backend", backend, "--seconds", str(seconds)]
        starter = lambda rank: [sys.executable, "-m", "launch.doctor.collective_worker", "--rank", str(rank), *options]  # noqa: E731
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="align-doctor-") as folder, contextlib.ExitStack() as stack:
        places = [Path(folder) / str(rank) for rank in range(world)]
        workers = [_start(stack, starter(rank), place) for rank, place in enumerate(places)]
        deadline = started + seconds + grace  # they give up by themselves first, and say why
        answers = [_answer(worker, place, deadline) for worker, place in zip(workers, places, strict=True)]
    good = [answer for answer in answers if isinstance(answer, dict)]
    if len(good) < world:
        said = "; ".join(f"process {rank}: {answer}" for rank, answer in enumerate(answers) if isinstance(answer, str))
        found.fail(f"{world} processes over {backend} did not agree: {said}", ADVICE[backend])
        return found
    slowest = min(answer["MB/s"] for answer in good)
    found.facts = {"processes": world, "sum": good[0]["sum"], "all-reduce of 16 MiB [MB/s]": slowest, "seconds": round(time.monotonic() - started, 1)}
    found.summary = f"{world} processes agree on the sum, {slowest:.0f} MB/s for 16 MiB"
    return found


def _start(stack: contextlib.ExitStack, command: Sequence[str], place: Path) -> subprocess.Popen[bytes]:
    """A worker that writes to place.out and place.err, and is killed when the stack is left."""
    with place.with_suffix(".out").open("wb") as output, place.with_suffix(".err").open("wb") as errors:
        worker = subprocess.Popen(list(command), stdin=subprocess.DEVNULL, stdout=output, stderr=errors, env=environment(OMP_NUM_THREADS="1"))
    stack.callback(worker.wait)
    stack.callback(worker.kill)  # callbacks run last in, first out: killed, then waited for
    return worker


def _answer(worker: subprocess.Popen[bytes], place: Path, deadline: float) -> dict[str, Any] | str:
    """A worker's JSON, or in words why there is none."""
    try:
        code = worker.wait(max(0.05, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return "no answer in time"
    lines = place.with_suffix(".out").read_text(errors="replace").strip().splitlines()
    if code == 0 and lines:
        answer: dict[str, Any] = json.loads(lines[-1])
        return answer
    return last_words(place.with_suffix(".err").read_text(errors="replace"), code)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
