"""Runs that are told to stop, and runs that hang: real processes, real signals, two ranks."""

from __future__ import annotations

import os
import random
import signal
import statistics
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from configs.exit_codes import HANG
from tests.forked import become_rank, forked, free_port
from tests.launch import launched, still, told
from tests.reliability.case import Case, Measured

STAGES = ("sft", "ppo")


def prepare() -> None:
    """Import what the forked processes need, with one thread: they must not wait for threads that were not forked with them."""
    import deepspeed  # noqa: F401
    import torch
    import trl  # noqa: F401

    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    torch.set_num_threads(1)


def trials(folder: Path, seed: int, ways: list[tuple[str, told.Way]]) -> list[dict[str, Any]]:
    """Each way of telling a stage to stop, at a drawn moment of its run."""
    prepare()
    draw = random.Random(seed)
    found = []
    whole: dict[str, dict[str, Any]] = {}
    for number, (stage, way) in enumerate(ways):
        if stage not in whole:
            told.workspace(folder / stage, stage)
            whole[stage] = told.settings(folder / stage, stage, "whole")
            assert told.ends(told.start(stage, whole[stage])) == [0, 0], (folder / stage / "whole.0.log").read_text()[-2000:]
        found.append(told.trial(folder / stage, stage, way, number, draw.randint(1, 4), draw.random() / 4, whole[stage]))
        print(f"  {stage}, {way.name}: {'ok' if told.good(found[-1]) else 'FAILED'}", {key: found[-1][key] for key in ("codes", "saves", "same")}, file=sys.stderr, flush=True)
        if not told.good(found[-1]):
            print(found[-1]["log"][-2000:], file=sys.stderr, flush=True)
    return found


def verdict(found: list[dict[str, Any]]) -> Measured:
    """How many trials lost nothing."""
    good = sum(map(told.good, found))
    failed = [f"{one['stage']}, {one['way']}: exit codes {one['codes']}, saves {one['saves']}, equal {one['same']}" for one in found if not told.good(one)]
    counts = ", ".join(f"{n} {name}" for name, n in Counter(one["stage"] for one in found).items())
    detail = f"{counts}; each: saves that verify, exit code of both processes, continued from that save, metrics and weights equal to the uninterrupted run's"
    return Measured(f"{good} of {len(found)}", good == len(found), "; ".join([detail, *failed]))


def signals_and_skews(folder: Path, seed: int, quick: bool) -> Measured:
    """Two signals x five skews x two stages."""
    ways = [(stage, way) for stage in STAGES for way in (told.WAYS[1::4] if quick else told.WAYS)]
    return verdict(trials(folder, seed, ways))


def more_signals(folder: Path, seed: int, quick: bool) -> Measured:
    """Signals again and again while it saves, and a first Ctrl-C."""
    again = [told.Way("SIGTERM every 20 ms", signal.SIGTERM, (0.0, 0.0), 0.02), told.Way("SIGINT once", signal.SIGINT, (0.0, 0.0))]
    return verdict(trials(folder, seed, [("sft", way) for way in again[: 1 if quick else 2]]))


def other_stages(folder: Path, seed: int, quick: bool) -> Measured:
    """The reward model and DPO, SIGTERM with each skew."""
    ways = [way for way in told.WAYS if way.number == signal.SIGTERM]
    return verdict(trials(folder, seed, [(stage, way) for stage in ("reward", "dpo") for way in (ways[1:2] if quick else ways)]))


def exchange_cost(folder: Path, seed: int, quick: bool) -> Measured:
    """Milliseconds of one exchange of the flag between two processes that have nothing to wait for."""
    prepare()
    out = folder / "times"
    port = free_port()
    children = [forked(partial(_measure, rank, port, out, 100 if quick else 1000)) for rank in range(2)]
    assert told.ends(children) == [0, 0]
    times = [float(line) for line in out.read_text().split()]
    median = 1000 * statistics.median(times)
    share = median / 1000 / 0.5
    return Measured(f"{median:.2f} ms", share < 0.01, f"median of {len(times)} exchanges (gloo, 2 processes), at most one in half a second: {share:.2%} of the time")


def _measure(rank: int, port: int, out: Path, count: int) -> None:
    from stages.training import stop
    from stages.training.ranks import process_group, wait_for_everyone

    become_rank(rank, 2, port)
    process_group()
    times = []
    for _ in range(count):
        began = time.perf_counter()
        stop.exchanged(0, 0.0)
        times.append(time.perf_counter() - began)
    if rank == 0:
        out.write_text("\n".join(map(str, times)))
    wait_for_everyone()


def stopped_rank(folder: Path, seed: int, quick: bool) -> Measured:
    """Rank 1 of a real `align sft` is stopped (SIGSTOP)."""
    found = launched.stop_a_rank(told.workspace(folder / "w", "sft"), limit=5.0)
    late = found["seconds"] - found["limit"]
    named = f"rank 1 did not answer: process {found['pid']} is T (stopped)" in found["log"] and "_inner_training_loop" in found["stacks"]
    ok = found["code"] == HANG and late <= 10 and found["gone"] and named
    return Measured(
        f"{late:.1f} s after the limit", ok, f"exit code {found['code']}; processes left: {'none' if found['gone'] else 'some'}; stacks of rank 0 and what is known of rank 1: {'there' if named else 'missing'}"
    )


def standing_still(folder: Path, seed: int, quick: bool) -> Measured:
    """Rank 1 of 2 sleeps for ever in each phase in turn, and in another run is stopped there."""
    prepare()
    bad, phases = [], list(still.STAGES)[2:3] if quick else list(still.STAGES)
    for stage in {still.STAGES[phase] for phase in phases}:
        told.workspace(folder / stage, stage)
    for at in range(0, len(phases), 2):  # two phases at once: these runs mostly wait
        started = [still.start(folder / still.STAGES[phase], phase, how) for phase in phases[at : at + 2] for how in still.LIMITS]
        with ThreadPoolExecutor(len(started)) as pool:  # each end is timed when it comes
            ended = list(pool.map(still.problems, started))
        for run, found in zip(started, ended, strict=True):
            print(f"  {run.phase}, rank 1 {run.how}: {'ok' if not found else 'FAILED'}", *found, file=sys.stderr, flush=True)
            bad += [f"{run.phase}, rank 1 {run.how}: {', '.join(found)[:300]}"] * bool(found)
    count = len(phases) * len(still.LIMITS)
    detail = f"{', '.join(phases)}: rank 1 of 2 sleeps there for ever, and is stopped there in another run; stacks of all that can still write them, the phase named"
    return Measured(f"{count - len(bad)} of {count}", not bad, "; ".join([detail, *bad]))


CASES = [
    Case("SIGTERM and SIGUSR1, skew 0, 0.2, 1 s, one rank only", "20 of 20 complete saves, exit code 85, resumed to the bit", signals_and_skews, "real processes"),
    Case("signals while saving, and Ctrl-C", "2 of 2 complete saves, exit codes 85 and 130, resumed to the bit", more_signals, "real processes"),
    Case("SIGTERM to the reward model's and DPO's training, skew 0, 0.2, 1 s, one rank only", "10 of 10 complete saves, exit code 85, resumed to the bit", other_stages, "real processes"),
    Case("cost of agreeing to stop", "below 1 % of the time", exchange_cost, "real processes"),
    Case("a stopped rank (SIGSTOP) of a real `align sft`, in an update", "ended within limit + 10 s, exit code 110, all stacks, nothing left", stopped_rank, "real processes"),
    Case("a rank that stands still in any other phase", "12 of 12 ended within limit + 10 s, exit code 110, all stacks", standing_still, "real processes, standing still by a hook"),
]
