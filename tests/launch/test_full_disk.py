"""A disk that is full while a save is due, on a real file system of a few hundred kilobytes: training goes on, nothing sound is lost, no process waits."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
from pathlib import Path

import deepspeed  # noqa: F401 - imported before the forks, once
import pytest
import torch
import trl  # noqa: F401

from stages.registry import Registry
from stages.training import saves
from tests.launch import ppo_mortal, zero_mortal
from tests.launch.small_disk import fill, in_small_disk, make_room
from tests.stage import ppo_runs, runs

# What happens at the save of this number, from 1: the disk is full, there is room again, rank 1 alone can't write, what was written reads back otherwise.
EVENTS = {2: "full", 3: "full", 4: "room", 5: "rank 1", 6: "damaged"}
SIZE = 3 * 2**20  # bytes, of which a save of the tiny model takes a third
TRAIN = {"max_steps": 8, "save_every": 1, "eval_every": 4, "micro_batch_size": 2}
PPO_TRAIN = {"iterations": 8, "save_every": 1, "num_ppo_epochs": 1, "num_minibatches": 1}
CASES = [("sft", 2, 0), ("reward", 2, 2), ("ppo", 1, 0), ("ppo", 2, 3)]  # `make reliability` runs all of them, and one of DPO


def prepare(rank: int, output: Path, record: Path, world: int) -> None:
    """Have this process's saves meet EVENTS, and rank 0 note what is there after each."""
    signal.alarm(120)  # a process that waits for another for ever is a failure
    store, differs, torch_save = saves.store, saves.differs, torch.save
    calls = 0
    event: str | None = None

    def storing(folder, name, *rest, **keywords):
        nonlocal calls, event
        calls += 1
        event = EVENTS.get(calls)
        if rank == 0 and event == "full":
            fill(output, 20_000)
        elif rank == 0:
            make_room(output)
        why = store(folder, name, *rest, **keywords)
        if rank == 0:
            sound = [save.name for save in saves.saves(folder) if saves.problem(save) is None]
            with record.open("a") as stream:
                stream.write(json.dumps({"save": calls, "why": why, "sound": sound, "there": sorted(os.listdir(folder))}) + "\n")
        return why

    def reading_back(save, part):
        return "weights are damaged" if event == "damaged" and rank == 0 and save.name.startswith("checkpoint") else differs(save, part)

    def failing(*arguments, **keywords):
        if event == "rank 1" and rank == world - 1:
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")
        return torch_save(*arguments, **keywords)

    def full(*arguments, **keywords):
        if event == "rank 1" and rank == world - 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return save_file(*arguments, **keywords)

    import safetensors.torch

    save_file = safetensors.torch.save_file
    saves.store, saves.differs, torch.save, safetensors.torch.save_file = storing, reading_back, failing, full


def check(folder: Path, stage: str, world: int, zero: int) -> None:
    """Run a stage twice, the second time on a small disk where its saves meet EVENTS; raises AssertionError where anything else than those saves is lost."""
    record, output = folder / "record.jsonl", folder / "disturbed"
    output.mkdir()
    if stage == "ppo":
        ppo_runs.workspace(folder)
        pair = [ppo_runs.settings(folder, name, PPO_TRAIN) for name in ("alone", "disturbed")]
    else:
        runs.workspace(folder, rows=40)
        pair = [runs.settings(folder, stage, TRAIN, name=name, output=str(folder / name)) for name in ("alone", "disturbed")]

    def run(values, prepared=None):
        if stage == "ppo":
            return ppo_mortal.run_in_processes(values, world, zero_stage=zero, prepare=prepared)
        return zero_mortal.run_in_processes(stage, values, world, zero, prepare=prepared)

    def disturbed() -> int:
        log = os.open(folder / "said.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))  # pytest's own write elsewhere
        ended = run(pair[1], lambda rank: prepare(rank, output, record, world))
        (folder / "metrics.jsonl").write_bytes((output / "metrics.jsonl").read_bytes())
        return int(any(ended))

    assert run(pair[0]) == [0] * world
    code = in_small_disk(output, SIZE, disturbed)
    assert code != 254, "no tmpfs can be mounted here: this has shown nothing"
    said = (folder / "said.txt").read_text()
    assert code == 0, said[-3000:]

    seen = {line["save"]: line for line in map(json.loads, record.read_text().splitlines())}
    assert [number for number, line in seen.items() if line["why"]] == [2, 3, 5, 6]
    assert seen[2]["sound"] == seen[3]["sound"] == ["checkpoint-1"], "the old save stays while there is no new one"
    assert seen[4]["sound"] == seen[5]["sound"] == seen[6]["sound"] == ["checkpoint-4", "checkpoint-1"]
    assert seen[7]["sound"] == ["checkpoint-7", "checkpoint-4"]
    assert not [name for line in seen.values() for name in line["there"] if name.startswith(".")], "nothing torn is left"
    assert "damaged-checkpoint-6" in seen[6]["there"]
    assert said.count("training goes on and checkpoint-1 stays the one to resume from") == 1, "one warning for two saves"
    assert said.count("training goes on and checkpoint-4 stays the one to resume from") == 1
    assert "is written; 2 before it could not be" in said

    if stage == "ppo":
        assert ppo_runs.metrics(pair[1] | {"output": str(folder)}) == ppo_runs.metrics(pair[0])
    else:
        assert (folder / "metrics.jsonl").read_bytes() == (folder / "alone" / "metrics.jsonl").read_bytes()
    first, second = (runs.weights(Registry(folder / "registry").resolve(f"{stage}/{values['name']}")) for values in pair)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("stage", "world", "zero"), [CASES[0], CASES[3]])
def test_a_full_disk_costs_saves_and_nothing_else(tmp_path, monkeypatch, stage, world, zero):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    check(tmp_path, stage, world, zero)
