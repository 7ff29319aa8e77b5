"""Being told to stop: SIGTERM and SIGUSR1 (a time limit, a preemption) and Ctrl-C. All processes save at the same step and leave.

A signal handler only remembers. What follows depends on where the run is:

- Before training nothing has to be saved: the process leaves at once.
- While it trains, the processes agree by an all-reduced flag at the end of a step, so that all save after the same one, however far apart
  the signals came, or when they reached one process only. The flag is exchanged about twice a second: at the end of every step of half a
  second or more, of every tenth where a step takes 50 ms. All processes count the same steps.
- Once all steps are taken, the last evaluation and the publishing are finished. Where time runs out, the newest save holds the trained weights.

The exit code is REQUEUE (85), or 130 after Ctrl-C. A second Ctrl-C leaves at once; another SIGTERM or SIGUSR1 changes nothing.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from enum import Enum
from types import FrameType
from typing import NoReturn

from configs.exit_codes import REQUEUE
from stages.training import siblings

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name))
INTERRUPTED = 128 + signal.SIGINT
KILLED = 128 + signal.SIGTERM
EVERY = 0.5  # seconds between two exchanges of the flag
MOST_STEPS = 100  # between two exchanges, however fast they are
UNWINDING = 3.0  # seconds that a process which leaves at once gets to close what it has open
STOPPED = "stopped because it was told to"  # launch/process.py knows a stage that ended so by these words


class Mode(Enum):
    """What a signal does."""

    LEAVE = "leave at once"
    AGREE = "save after the step that all agree on"
    FINISH = "evaluate and publish what is trained"
    LEAVING = "nothing: the process is ending"


class _Listener:
    """What this process has been told."""

    def __init__(self) -> None:
        self.mode = Mode.LEAVE
        self.received: list[int] = []
        self.listening = False

    def asked(self) -> int:
        """The exit code that the signals so far ask for; 0 for none."""
        if not self.received:
            return 0
        return INTERRUPTED if signal.SIGINT in self.received else REQUEUE

    def handle(self, number: int, _: FrameType | None) -> None:
        """Runs in the main thread, between two bytecodes."""
        self.received.append(number)
        if number == signal.SIGINT and self.received.count(number) > 1:
            os._exit(INTERRUPTED)
        if self.mode is Mode.LEAVE:
            self.mode = Mode.LEAVING
            _tell_nothing_is_lost()
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            raise SystemExit(REQUEUE)

    def watch(self, pipe: int) -> None:
        """Runs in a thread of its own: the main thread may wait in a library that no handler interrupts."""
        interrupts = 0
        while number := os.read(pipe, 1)[0]:
            interrupts += number == signal.SIGINT
            if number in SIGNALS:
                threading.Thread(target=self._see_to_it, args=(interrupts,), daemon=True).start()

    def _see_to_it(self, interrupts: int) -> None:
        leave_now = self.mode in (Mode.LEAVE, Mode.LEAVING) or interrupts > 1
        until = time.monotonic() + (0.0 if interrupts > 1 else UNWINDING)
        while leave_now or self.mode is Mode.AGREE:
            if leave_now and time.monotonic() >= until:
                if self.mode is Mode.LEAVE:  # the main thread, which would say so, is in a library that does not come back
                    _tell_nothing_is_lost()
                os._exit(INTERRUPTED if interrupts else REQUEUE)
            time.sleep(0.25)
            if self.mode is Mode.AGREE and siblings.one_is_gone():
                os._exit(KILLED)  # that is why the launcher ends this one too: nobody is left to agree with


_here = _Listener()


def listen() -> None:
    """Take the signals from now on; called once, in the main thread of a stage's process, as early as can be."""
    if _here.listening:
        return
    _here.listening = True
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    threading.Thread(target=_here.watch, args=(reading,), daemon=True, name="signals").start()
    os.register_at_fork(after_in_child=_deafen)
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup and the like are obeyed
            signal.signal(number, _here.handle)


def _deafen() -> None:
    """In a process that this one has forked, as pools and data loaders do: a signal to it is its own, and would come out of our pipe."""
    if not _here.listening:
        return
    _here.listening = False
    signal.set_wakeup_fd(-1)
    for number in SIGNALS:
        if signal.getsignal(number) == _here.handle:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def mode(new: Mode) -> None:
    """From now on signals do this. What came before and has not been acted upon is kept."""
    _here.mode = new


def saves_at_steps(saves: bool) -> None:
    """Whether there is something to save when a signal comes: then processes agree on a step, else each leaves at once.

    Raises:
        SystemExit: one has come before, and there is nothing to save.
    """
    mode(Mode.AGREE if saves else Mode.LEAVE)
    if not saves and _here.asked():
        mode(Mode.LEAVING)
        _tell_nothing_is_lost()
        raise SystemExit(_here.asked())


class Agreement:
    """All processes come to know at the same step that one of them has been told to stop."""

    def __init__(self) -> None:
        self.code = 0
        self._steps = 0
        self._wait = 1  # steps from one exchange to the next
        self._last = time.monotonic()

    def at_step_end(self) -> int:
        """Called by every process at the end of every step: the exit code once all have agreed to stop after this one, else 0."""
        self._steps += 1
        return self.now() if self._steps >= self._wait else 0

    def now(self) -> int:
        """The same, without waiting for the next exchange. A collective of two numbers, [2]."""
        seconds = (time.monotonic() - self._last) / max(self._steps, 1)
        self.code, slowest = exchanged(_here.asked(), seconds)
        self._wait = min(max(int(EVERY / max(slowest, 1e-6)), 1), MOST_STEPS)  # from what all of them know: all count alike
        self._steps, self._last = 0, time.monotonic()
        return self.code


def exchanged(code: int, seconds: float) -> tuple[int, float]:
    """The largest of all processes' codes and seconds; a collective."""
    import torch

    from stages.training.ranks import process_group, world_size

    if world_size() == 1:
        return code, seconds
    both = torch.tensor([float(code), seconds], device=process_group().device)
    torch.distributed.all_reduce(both, torch.distributed.ReduceOp.MAX)
    largest, slowest = both.tolist()
    return int(largest), slowest


def leave(code: int, where: str) -> NoReturn:
    """End this process as all have agreed to; on every process, once what is to be kept is kept. `where`: how far the run has come.

    Raises:
        SystemExit: always.
    """
    from stages.training.ranks import say, wait_for_everyone

    mode(Mode.LEAVING)
    wait_for_everyone()
    say(f"{STOPPED} ({_names()}): {where}; the same command continues from its newest save (exit code {code})")
    raise SystemExit(code)


def _names() -> str:
    return ", ".join(dict.fromkeys(signal.Signals(number).name for number in _here.received)) or "a signal to another process"


def _tell_nothing_is_lost() -> None:
    """Where a handler may have interrupted print in the middle of a line."""
    os.write(2, f"{STOPPED} ({_names()}): nothing had to be saved; the same command continues (exit code {_here.asked()})\n".encode())
