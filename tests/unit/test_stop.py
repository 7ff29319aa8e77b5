"""Being told to stop: what a signal does where the run is, and that all processes count the same steps."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from configs.exit_codes import REQUEUE
from stages.training import siblings, stop
from tests.stage.runs import ROOT

START = "import os, signal, sys, time\nfrom stages.training import stop\nstop.listen()\n"
READY = "print('ready', flush=True)\n"
IN_FRONT = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a job in the background, as these tests may be, inherits that Ctrl-C is ignored
DEADLOCK = """
import ctypes
lock = ctypes.create_string_buffer(64)
wait = ctypes.CDLL(None).pthread_mutex_lock
wait(lock)
print('ready', flush=True)
wait(lock)  # a library that no handler interrupts
"""


def told(code: str, *signals: tuple[float, int]) -> tuple[int, float, str]:
    """Exit code, seconds from the first signal to the end, and stderr of a process that gets (seconds, signal) once it has said ready."""
    child = subprocess.Popen([sys.executable, "-c", IN_FRONT + START + code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    began = time.monotonic()
    for after, number in signals:
        time.sleep(max(0.0, began + after - time.monotonic()))
        child.send_signal(number)
    _, err = child.communicate(timeout=60)
    return child.returncode, time.monotonic() - began, err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_before_training_a_process_leaves_at_once(number):
    code, _, err = told(READY + "try: time.sleep(60)\nfinally: print('closed', file=sys.stderr)", (0, number))
    assert code == REQUEUE
    assert f"stopped because it was told to ({signal.Signals(number).name}): nothing had to be saved; the same command continues (exit code 85)" in err
    assert "closed" in err, "what is open is closed on the way"


def test_before_training_it_leaves_from_a_library_that_does_not_come_back():
    code, seconds, err = told(DEADLOCK, (0, signal.SIGTERM))
    assert code == REQUEUE
    assert stop.UNWINDING - 0.5 < seconds < 25
    assert "nothing had to be saved" in err


def test_while_training_a_signal_waits_for_the_step_and_any_number_more_change_nothing():
    code, seconds, err = told("stop.saves_at_steps(True)\n" + READY + "time.sleep(2)\nsys.exit(stop._here.asked())", *[(0.05 * n, signal.SIGTERM) for n in range(20)])
    assert (code, err) == (REQUEUE, "")
    assert seconds > 1.9


@pytest.mark.parametrize(("signals", "step", "least", "most"), [(1, 1.5, 1.4, 30), (2, 40, 0, 30)])
def test_a_first_ctrl_c_waits_for_the_step_and_a_second_leaves_at_once(signals, step, least, most):
    waits = "stop.saves_at_steps(True)\n" + READY + f"until = time.monotonic() + {step}\nwhile time.monotonic() < until: time.sleep(0.01)\nsys.exit(stop._here.asked())"
    code, seconds, _ = told(waits, *[(0.2 * n, signal.SIGINT) for n in range(signals)])
    assert code == 130
    assert least <= seconds <= most


def test_a_second_ctrl_c_leaves_a_library_that_does_not_come_back():
    code, seconds, _ = told("stop.saves_at_steps(True)\n" + DEADLOCK, (0, signal.SIGINT), (0.3, signal.SIGINT))
    assert code == 130
    assert seconds < 25


def test_what_was_told_while_it_had_to_be_kept_is_heeded_once_nothing_is():
    code, _, err = told("stop.saves_at_steps(True)\n" + READY + "time.sleep(0.5)\nstop.saves_at_steps(False)\ntime.sleep(60)", (0, signal.SIGUSR1))
    assert code == REQUEUE
    assert "nothing had to be saved" in err


def test_publishing_is_finished():
    code, seconds, err = told("stop.mode(stop.Mode.FINISH)\n" + READY + "time.sleep(1)\nprint('published', file=sys.stderr)", (0, signal.SIGTERM), (0.1, signal.SIGUSR1))
    assert (code, err) == (0, "published\n")
    assert seconds > 0.9


def test_ignored_signals_stay_ignored():
    ignoring = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    done = subprocess.run([sys.executable, "-c", ignoring + START + "assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN"], cwd=ROOT, env=os.environ, check=False)
    assert done.returncode == 0


def test_the_exchange_follows_the_slowest_process_and_its_answer_holds_for_all(monkeypatch):
    clock, told_code, exchanges = [0.0], [0], []

    def exchanged(code, seconds):
        exchanges.append(clock[0])
        return max(code, told_code[0]), max(seconds, 0.02)  # another process takes 20 ms a step

    monkeypatch.setattr(stop, "exchanged", exchanged)
    monkeypatch.setattr(stop.time, "monotonic", lambda: clock[0])
    agreement = stop.Agreement()
    for step in range(1, 61):
        clock[0] = step * 0.01
        if step == 30:
            told_code[0] = REQUEUE
        if agreement.at_step_end():
            break
    assert exchanges == [0.01, 0.26, 0.51], "after the first step, then every 0.5 / 0.02 = 25 steps"
    assert (step, agreement.code) == (51, REQUEUE)


def test_slow_steps_exchange_at_every_step(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(stop.time, "monotonic", lambda: clock[0])
    seen = []
    monkeypatch.setattr(stop, "exchanged", lambda code, seconds: (seen.append(seconds) or code, seconds))
    agreement = stop.Agreement()
    for _ in range(4):
        clock[0] += 30.0
        agreement.at_step_end()
    assert seen == [30.0] * 4


FORKS = """
child = os.fork()
if not child:
    time.sleep(60)
time.sleep(0.2)
os.kill(child, signal.SIGTERM)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
time.sleep(stop.UNWINDING + 0.5)
assert not stop._here.received
"""


def test_a_forked_process_is_ended_as_ever_and_this_one_does_not_hear_of_it():
    """The pool of a tokeniser ends its workers with SIGTERM."""
    done = subprocess.run([sys.executable, "-c", START + FORKS], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_processes_that_cannot_be_seen_are_not_gone(monkeypatch):
    """Under a wrapper, or without lists of children in /proc, a signal ended every process before it had saved."""
    monkeypatch.setenv(siblings.LAUNCHED_BY_TORCH, "run")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert siblings.one_is_gone() == (os.getpid() in siblings.children(os.getppid()))
    monkeypatch.setattr(siblings, "children", lambda pid: [])
    assert not siblings.one_is_gone()
    monkeypatch.setattr(siblings, "children", lambda pid: [os.getpid()])
    assert siblings.one_is_gone()
