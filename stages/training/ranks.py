"""Which process this is, and how all of them come to know what one of them did."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any, TypeVar

from configs.errors import UserError
from configs.printable import printable

T = TypeVar("T")
# How long the others wait in a collective for one process that downloads, verifies or publishes a model: 280 GB (70B in float32) at
# 0.2 GB/s take 25 minutes to write. NCCL's own 10 minutes would end a finished training before it is published.
PATIENCE = timedelta(hours=2)


def rank() -> int:
    """This process's rank as the launcher set it; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """The number of processes as the launcher set it; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def say(line: str) -> None:
    """Print a line on rank 0. Where it goes to a file on a full disk, or to a reader that has gone, it is lost and the run goes on."""
    if rank() == 0:
        with suppress(OSError):
            print(printable(line), flush=True)


def process_group() -> Any:
    """Accelerate's state of this process; joins the process group when that has not happened yet, whose collectives wait for PATIENCE."""
    import torch
    from accelerate import PartialState

    return PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)


def wait_for_everyone() -> None:
    """Return when every rank has come here."""
    process_group().wait_for_everyone()


def from_rank_0(what: str, function: Callable[[], T]) -> T:
    """Call `function` on rank 0 alone and give every rank its value (it is pickled).

    Raises:
        UserError: on every rank, when the call failed on rank 0: no rank is left waiting.
    """
    from accelerate.utils import broadcast_object_list

    process_group()
    box: list[Any] = [None, None]
    if rank() == 0:
        try:
            box[0] = function()
        except UserError as error:
            box[1] = str(error)
        except Exception as error:
            if world_size() == 1:
                raise
            box[1] = f"{what} failed: {type(error).__name__}: {error}"
    if world_size() > 1:
        broadcast_object_list(box, from_process=0)
    if box[1] is not None:
        raise UserError(box[1])
    return box[0]
