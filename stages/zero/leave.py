"""How a process of a distributed run ends: the group is shut down in order where all have come to the end, then the process is gone at once.

Left to itself, Python tears the process down while DeepSpeed still holds gloo's groups and their threads run: about one two-process run
in twenty then aborts ("terminate called without an active exception", exit code -6) although all its work is done.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import os
import sys
import threading
import traceback
from typing import NoReturn

from stages.training.exit_later import exit_later
from stages.training.ranks import wait_for_everyone

BOUND = 900.0  # seconds: rank 0 may still be removing terabytes of saves while the others wait for it
SILENT = 60.0  # more, for a process in which no thread can say so


def leave(error: BaseException | None = None) -> None:
    """End this process with the exit code that Python would give it for `error` (what ended the run, if anything did); after no error, all
    leave the process group together first. Without a group this returns, and Python ends the process as ever.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return
    code = exit_code(error)  # says first what went wrong
    end_within(BOUND, code)
    if error is None:
        wait_for_everyone()  # nobody leaves while another may still ask it for something
        distributed.destroy_process_group()  # with NCCL all must come: after an error others may not, and this process would hang
    end(code)


def end_within(seconds: float, code: int) -> None:
    """From now on this process lives for so long at the most: what the run was for is done, and nothing watches it any more.

    A process that never comes, a thread or an exit handler that never ends would hold the processors until the job's time is over.
    """

    def gone() -> None:
        with contextlib.suppress(OSError, ValueError):
            os.write(2, f"warning: the process did not end within {seconds:g} s after its work and is ended now, with its exit code {code}; where it hung:\n".encode())
            faulthandler.dump_traceback(sys.__stderr__ or sys.stderr, all_threads=True)
        os._exit(code)

    timer = threading.Timer(seconds, gone)
    timer.daemon = True  # never waited for
    timer.start()
    faulthandler.dump_traceback_later(seconds + SILENT, exit=not exit_later(seconds + SILENT + 1, code))  # where a library keeps the interpreter's lock


def exit_code(error: BaseException | None) -> int:
    """The exit code for what ended the run; prints the traceback of what is neither a normal end nor sys.exit."""
    if error is None:
        return 0
    if isinstance(error, SystemExit):
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    traceback.print_exception(error)
    return 130 if isinstance(error, KeyboardInterrupt) else 1


def end(code: int) -> NoReturn:
    """End the process as Python does, threads and exit handlers first (trackers send what they hold), but without unloading libraries."""
    threading._shutdown()  # type: ignore[attr-defined]  # ends idle executors, then joins: a plain join of their threads would never return
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # the reader has gone
            stream.flush()
    os._exit(code)
