"""Processes forked from a test's own, which has everything imported, so that a run of a second does not wait ten for its start."""

from __future__ import annotations

import os
import socket
import sys
import traceback
from collections.abc import Callable


def forked(work: Callable[[], int | None], failed: int = 1) -> int:
    """Start a process that calls `work`; its id.

    It ends with what `work` returns (None is 0), after SystemExit with its code, after anything else with `failed` and a traceback; and without
    Python's own ending, whose handlers are the test's.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    code = failed
    try:
        code = work() or 0
    except SystemExit as left:
        code = int(left.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def become_rank(rank: int, world: int, port: int) -> None:
    """Make a forked process one of `world`, as a launcher on a machine without GPUs would: it meets the others on `port`."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ["ACCELERATE_USE_CPU"] = "true"
    if world > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
