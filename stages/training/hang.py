"""The end of a run that hangs: every process writes its stacks, the first one says who did not come, and nothing is left behind."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from configs.exit_codes import HANG
from stages import processes
from stages.training import siblings
from stages.training.exit_later import exit_later
from stages.training.watchdog import WANTED

if TYPE_CHECKING:
    from stages.training.watchdog import Watch

ADVICE = {
    "load": "the disk or network that models are read from; a process that runs out of memory (dmesg)",
    "data": "the disk or network that data is read from; one row that takes for ever (`align data check`)",
    "rollout": "the GPU (nvidia-smi, dmesg for Xid errors); an engine's server that does not answer",
    "scoring": "what a scorer waits for (a server, a lock); the GPU (nvidia-smi, dmesg for Xid errors)",
    "update": "the network between GPUs and nodes (NCCL_DEBUG=INFO, align doctor); the GPU (nvidia-smi, dmesg for Xid errors)",
    "eval": "the network between GPUs and nodes (NCCL_DEBUG=INFO, align doctor); what a held-out scorer waits for",
    "save": "the filesystem of the working folder: full, or its server gone (df, dmesg)",
    "publish": "the filesystem of the registry: full, or its server gone (df, dmesg); align registry doctor",
}


def end(watch: Watch) -> NoReturn:
    """Write this process's stacks, wait for the others', say what was found, and leave with HANG; local processes that do not answer are killed."""
    with contextlib.suppress(OSError):
        (watch.folder / WANTED).touch()
    # Should what follows hang too, as on a filesystem that does not answer.
    faulthandler.dump_traceback_later(2 * watch.answer, exit=not exit_later(2 * watch.answer + 1, HANG))
    lines = [describe(watch)]
    with contextlib.suppress(OSError), stacks_file(watch, watch.rank).open("w") as stream:
        stream.write(f"{lines[0]}\n\n")
        stream.flush()
        faulthandler.dump_traceback(stream, all_threads=True)
    faulthandler.dump_traceback(sys.__stderr__ or sys.stderr, all_threads=True)
    missing = wait_for_stacks(watch)
    others = siblings.siblings()
    for rank in missing:
        lines.append(absent(watch, rank, others.get(rank)))
    if watch.rank == min(set(range(watch.world)) - set(missing), default=watch.rank):
        lines.append(f"stacks: {watch.output}/hang-rank-*.txt; look at: {ADVICE[watch.now.phase]}; if that was only slow, raise watchdog.{watch.now.phase} (exit code {HANG})")
        os.write(2, f"error: {'; '.join(lines)}\n".encode())
    with contextlib.suppress(OSError), stacks_file(watch, watch.rank).open("a") as stream:
        stream.write("".join(f"\n{line}\n" for line in lines[1:]))
    for rank in missing:
        if rank in others:
            with contextlib.suppress(OSError):
                os.kill(others[rank], signal.SIGKILL)  # a stopped process heeds nothing else, and the launcher would wait for it
    os._exit(HANG)


def stacks_file(watch: Watch, rank: int) -> Path:
    """Where the stacks of a process go."""
    return watch.output / f"hang-rank-{rank}.txt"


def describe(watch: Watch) -> str:
    """Which process this is, what it does and since when."""
    now, limit = watch.now, watch.limits[watch.now.phase]
    still = time.monotonic() - now.beaten
    return (
        f"rank {watch.rank} of {watch.world} (process {os.getpid()}) hangs: no progress for {still:.1f} s in phase {now.phase} "
        f"(limit: watchdog.{now.phase}, {limit / 60:g} min), {time.monotonic() - now.began:.1f} s after it began, step {now.step}"
    )


def wait_for_stacks(watch: Watch) -> list[int]:
    """The processes that have not written their stacks after `watch.answer` seconds; those of this machine are asked once more, by a signal."""
    asked, until = False, time.monotonic() + watch.answer
    while True:
        missing = [rank for rank in range(watch.world) if not written(watch, rank)]
        left = until - time.monotonic()
        if not missing or left <= 0:
            return missing
        if left < watch.answer / 2 and not asked:
            asked = True
            for pid in siblings.siblings().values():
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGUSR2)
        time.sleep(0.1)


def written(watch: Watch, rank: int) -> bool:
    """Whether a process has written its stacks since this run began."""
    with contextlib.suppress(OSError):
        return stacks_file(watch, rank).stat().st_mtime >= watch.started
    return False


def absent(watch: Watch, rank: int, pid: int | None) -> str:
    """What is known of a process that has not written its stacks, and what it wrote when it was asked by a signal."""
    last = watch.read_heartbeat(rank)
    text = f"rank {rank} did not answer"
    if pid is not None:
        text += f": process {pid} is {processes.state(pid) or 'gone'}"
    elif last and last["host"] == os.uname().nodename and not processes.state(last["pid"]):
        text += f": process {last['pid']} is gone"
    if last:
        text += f"; last seen on {last['host']} in phase {last['phase']} at step {last['step']}, {time.time() - last['beaten']:.1f} s ago"
    with contextlib.suppress(OSError):
        stacks = (watch.folder / f"rank-{rank}.stacks").read_text()
        if stacks:
            stacks_file(watch, rank).write_text(f"{text}\n\n{stacks}")
    return text
