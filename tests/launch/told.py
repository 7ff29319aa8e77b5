"""Stages in processes that are told to stop by real signals, at once, one after the other or one process only; and what they leave.

Processes are forked from one that has everything imported, and go the way of a stage's command (stages/training/entry.py); that a real
`accelerate launch` passes signals on is shown by test_signals.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from stages.training import entry, saves
from tests.forked import become_rank, forked, free_port
from tests.stage import ppo_runs, runs

SFT = {"max_steps": 60, "eval_every": 20, "save_every": 60, "log_every": 3, "micro_batch_size": 2}
PPO = {"iterations": 10, "save_every": 4, "micro_batch_size": 4}


@dataclass(frozen=True)
class Way:
    """How the processes are told: the signal, and when each of them gets it, in seconds after the first; None: not at all."""

    name: str
    number: int
    at: tuple[float | None, ...]
    again: float = 0.0  # repeated every so many seconds until the processes have ended

    @property
    def code(self) -> int:
        """The exit code that belongs to it."""
        return 130 if self.number == signal.SIGINT else 85


AT = {"skew 0": (0.0, 0.0), "skew 0.2 s": (0.0, 0.2), "skew 1 s": (0.0, 1.0), "rank 0 only": (0.0, None), "rank 1 only": (None, 0.0)}
WAYS = [Way(f"{signal.Signals(number).name}, {name}", number, at) for number in (signal.SIGTERM, signal.SIGUSR1) for name, at in AT.items()]


def workspace(folder: Path, stage: str) -> Path:
    """What the stage's runs start from."""
    return ppo_runs.workspace(folder) if stage == "ppo" else runs.workspace(folder, rows=60)


def settings(folder: Path, stage: str, name: str, **train: Any) -> dict[str, Any]:
    """The config of one run, with an output folder of its own; dropout is on where the stage allows it."""
    if stage == "ppo":
        return ppo_runs.settings(folder, name, PPO | train)
    lora = {"rank": 4, "alpha": 8.0, "dropout": 0.1}
    return runs.settings(folder, stage, SFT | train, name=name, output=str(folder / name), lora=lora)


def start(stage: str, values: dict[str, Any], world: int = 2, prepare: Callable[[int], None] | None = None) -> list[int]:
    """Fork the processes of a stage; their ids, by rank. `prepare(rank)` is called in each first."""
    port = free_port()
    config = Path(values["registry"]).parent / f"{values['name']}.json"
    config.write_text(json.dumps(values))
    return [forked(partial(_run, stage, config, rank, world, port, prepare)) for rank in range(world)]


def _run(stage: str, config: Path, rank: int, world: int, port: int, prepare: Callable[[int], None] | None) -> None:
    become_rank(rank, world, port)
    log = os.open(config.with_suffix(f".{rank}.log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))  # pytest's own write elsewhere
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background inherits that Ctrl-C is ignored
    if prepare is not None:
        prepare(rank)
    entry.run(main_of(stage), stage, ["--config", str(config)])


def main_of(stage: str) -> Any:
    """The stage's recipe."""
    if stage == "ppo":
        from stages.ppo.train import main
    else:
        from importlib import import_module

        main = import_module(f"stages.{stage}").main
    return main


def ends(children: Sequence[int], within: float = 120.0) -> list[int]:
    """How they end, by rank: an exit code, or minus the signal. Those that do not are killed."""
    until, ended = time.monotonic() + within, {}
    while len(ended) < len(children):
        for child in set(children) - set(ended):
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                ended[child] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > until:
            for child in set(children) - set(ended):
                os.kill(child, signal.SIGKILL)
        time.sleep(0.01)
    return [ended[child] for child in children]


def lines(values: dict[str, Any]) -> list[dict[str, Any]]:
    """The metrics so far, without what a clock measured."""
    file = Path(values["output"]) / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().split("\n")[:-1]] if file.exists() else []
    return [{k: v for k, v in row.items() if not (k.startswith("time/") or k.endswith("_per_second"))} for row in rows]


def tell(children: Sequence[int], values: dict[str, Any], way: Way, after_lines: int, wait: float) -> list[int]:
    """Send the signals once the run has written so many lines of metrics, `wait` seconds later; how the processes end."""
    until = time.monotonic() + 120
    while len(lines(values)) < after_lines:
        assert time.monotonic() < until, "the run does not get on"
        time.sleep(0.005)
    time.sleep(wait)
    began = time.monotonic()
    for at, child in sorted((at, child) for at, child in zip(way.at, children, strict=True) if at is not None):
        time.sleep(max(0.0, began + at - time.monotonic()))
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, way.number)
    if way.again:
        import threading

        threading.Thread(target=_hammer, args=(children, way), daemon=True).start()
    return ends(children)


def _hammer(children: Sequence[int], way: Way) -> None:
    for _ in range(200):
        for child in children:
            try:
                os.kill(child, way.number)
            except ProcessLookupError:
                return
        time.sleep(way.again)


def trial(folder: Path, stage: str, way: Way, number: int, after_lines: int, wait: float, whole: dict[str, Any]) -> dict[str, Any]:
    """Stop a run so, look at what it left, run it again, and compare with the uninterrupted run `whole`."""
    values = settings(folder, stage, f"told-{number}")
    codes = tell(start(stage, values), values, way, after_lines, wait)
    kept = sorted((Path(values["output"]) / "resume").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    damaged = [why for save in kept if (why := saves.problem(save)) is not None]
    steps = len(lines(values))
    again = ends(start(stage, values))
    same = again == [0, 0] and lines(values) == lines(whole) and same_weights(stage, values, whole)
    log = (folder / f"told-{number}.0.log").read_text() + (folder / f"told-{number}.1.log").read_text()
    return {
        "stage": stage, "way": way.name, "codes": codes, "saves": [save.name for save in kept], "damaged": damaged, "lines": steps, "same": same,
        "complete": bool(kept) and not damaged and "could not save" not in log, "stopped": codes == [way.code] * len(codes), "resumed": f"from {kept[-1].name}" in log if kept else False,
        "log": log,
    }  # fmt: skip


def good(found: dict[str, Any]) -> bool:
    """Whether nothing was lost: complete saves, the exit code, continued from the newest, and equal to the bit in the end."""
    return all(found[key] for key in ("complete", "stopped", "resumed", "same"))


def same_weights(stage: str, values: dict[str, Any], whole: dict[str, Any]) -> bool:
    """Whether two runs have published the same numbers."""
    import torch

    from stages.registry import Registry

    first, second = (runs.weights(Registry(v["registry"]).resolve(f"{stage}/{v['name']}")) for v in (values, whole))
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
