"""Runs that were killed with kill -9 and started again, against the same run left alone: weights, metrics and metrics.jsonl, bit for bit, on the CPU.

Processes are forked from one that has everything imported, kill themselves with SIGKILL at chosen points, and find each other over gloo as under
`accelerate launch`. SFT has dropout (the other stages switch it off), gradients are accumulated over two micro-batches, and logs, evaluations and saves
fall on different steps, so that most saves lie within a logging window.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import torch

from stages.registry import Registry
from tests.launch import ppo_mortal, zero_mortal
from tests.reliability.case import Case, Measured
from tests.stage import ppo_runs, runs

STEPS = 8
TRAIN = {"max_steps": STEPS, "save_every": 3, "eval_every": 4, "log_every": 2, "batch_size": 8}
LORA = {"rank": 4, "alpha": 8, "dropout": 0.1}
Deaths = list[tuple[str, int]]
Damage = Callable[[Path], str]
# In turn: in a step, in the save after step 6 (all files there, no list yet), once more there (renamed, not read back), in the last step.
DEATHS: Deaths = [("step", 5), ("seal", 1), ("renamed", 1), ("step", 8)]
PPO_TRAIN = {"iterations": 5, "save_every": 2, "num_ppo_epochs": 2, "num_minibatches": 2, "micro_batch_size": 2}
PPO_DEATHS: Deaths = [("scoring", 4), ("seal", 1), ("renamed", 1)]
MORTAL = {"kind": "python", "function": "tests.stage.ppo_runs:mortal"}
LAYOUTS = [(1, 0), (2, 0), (1, 2), (2, 2), (1, 3), (2, 3)]  # processes, ZeRO stage


def layout_name(world: int, zero: int) -> str:
    """A layout in words."""
    return f"{world} process{'es' if world > 1 else ''}, {f'ZeRO-{zero}' if zero else 'DDP' if world > 1 else 'no launcher'}"


def supervised(stage: str, world: int, zero: int, folder: Path, seed: int, quick: bool, deaths: Deaths = DEATHS, damage: Damage | None = None) -> Measured:
    """One stage and layout, full or with adapters: every second layout has adapters. `damage(resume)` is called after each death, and tells what it did."""
    ready()
    runs.workspace(folder, rows=40, attention_dropout=0.1)
    adapters = (LAYOUTS.index((world, zero)) + ("sft", "reward", "dpo").index(stage)) % 2 == 1
    train = TRAIN | {"micro_batch_size": 4 // world}
    pair = [
        runs.settings(folder, stage, train, name=label, output=str(folder / label), lora=LORA if adapters else None, seed=seed) for label in ("whole", "killed")
    ]
    run = partial(zero_mortal.run_in_processes, stage, world=world, zero_stage=zero)
    found = killed_and_whole(lambda values, death=None: run(values, death=death), pair, deaths[1:2] if quick else deaths, folder / "said.txt", damage)
    lines = [(Path(values["output"]) / "metrics.jsonl").read_bytes() for values in pair]
    checkpoints = [Registry(folder / "registry").resolve(f"{stage}/{values['name']}") for values in pair]
    return verdict(found, lines, checkpoints, ("adapters" if adapters else "full training") + (", dropout 0.1" if stage == "sft" else ""))


def ppo(
    world: int, zero: int, folder: Path, seed: int, quick: bool, deaths: Deaths = PPO_DEATHS, damage: Damage | None = None, *, adapters: bool | None = None, offload: bool = False
) -> Measured:
    """PPO in one layout, as `supervised`; with adapters on one backbone in every second one, unless told. `offload`: the optimizer in main memory."""
    ready()
    ppo_runs.workspace(folder)
    adapters = LAYOUTS.index((world, zero)) % 2 == 1 if adapters is None else adapters
    if adapters:
        ppo_runs.publish_reward(folder, "adapter", lora=True)
    mode = {"lora": ppo_runs.LORA, "scorers": [MORTAL, {"kind": "model", "checkpoint": "reward/adapter"}]} if adapters else {"scorers": [MORTAL]}
    pair = [
        ppo_runs.settings(folder, label, PPO_TRAIN, seed=seed, adaptive_kl={"target": 1.0, "horizon": 100}, **mode) | {"name": "same"} for label in ("whole", "killed")
    ]
    run = partial(ppo_mortal.run_in_processes, world=world, zero_stage=zero, prepare=offloaded if offload else None)
    found = killed_and_whole(lambda values, death=None: run(values, death=death), pair, deaths[1:2] if quick else deaths, folder / "said.txt", damage)
    lines = [json.dumps(ppo_runs.metrics(values)).encode() for values in pair]  # without what a clock measured
    return verdict(found, lines, Registry(folder / "registry").list("ppo", "same"), "adapters" if adapters else "full training")


def offloaded(rank: int) -> None:
    """In a process that is about to run a stage under DeepSpeed: optimizer's state and gradients in main memory."""
    os.environ["ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE"] = "cpu"


def killed_and_whole(run: Callable[..., list[int]], pair: list[dict[str, Any]], deaths: Deaths, said: Path, damage: Damage | None = None) -> list[str]:
    """Run one config through, the other with a death after another and then to its end; what each death was, or raise where a run ended otherwise."""
    whole, killed = pair
    with said.open("w", buffering=1) as stream, redirect_stdout(stream), redirect_stderr(stream):
        if any(run(whole)):
            raise RuntimeError(f"the run that nothing happens to failed: {said.read_text()[-400:]}")
        told = []
        for death in deaths:
            ended = run(killed, death)
            if -signal.SIGKILL not in ended:
                raise RuntimeError(f"no process was killed at {death}: {ended}: {said.read_text()[-400:]}")
            held = sorted(path.name.removeprefix("checkpoint-") for path in (Path(killed["output"]) / "resume").glob("checkpoint-*"))
            told.append(f"{death[0]} {death[1]} (saves {', '.join(held) or 'none'}{damage(Path(killed['output']) / 'resume') if damage else ''})")
        if any(run(killed)):
            raise RuntimeError(f"the last resume failed: {said.read_text()[-400:]}")
    return told


def verdict(deaths: list[str], lines: list[bytes], checkpoints: list[Any], how: str) -> Measured:
    """Whether the published weights, the metrics of the manifests and metrics.jsonl are equal to the bit."""
    first, second = (runs.weights(checkpoint) for checkpoint in checkpoints)
    other = [name for name in first if name not in second or not torch.equal(first[name], second[name])]
    numbers = [checkpoint.info("metrics") for checkpoint in checkpoints]
    unequal = ["weights"] * bool(other or first.keys() != second.keys()) + ["metrics.jsonl"] * (lines[0] != lines[1]) + ["metrics"] * (without_clock(numbers[0]) != without_clock(numbers[1]))
    count = lines[0].count(b"\n") or len(json.loads(lines[0]))
    return Measured("equal" if not unequal else f"{', '.join(unequal)} differ", not unequal, f"{how}; {len(first)} tensors, {count} lines; kill -9: {'; '.join(deaths)}")


def without_clock(metrics: dict[str, Any]) -> dict[str, Any]:
    """Metrics that no clock measured."""
    return {key: value for key, value in metrics.items() if not (key.startswith("time/") or key.endswith("_per_second"))}


def ready() -> None:
    """Have everything imported once, and nothing of it in threads that a fork would leave behind."""
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    torch.set_num_threads(1)
    import deepspeed  # noqa: F401
    import trl  # noqa: F401


CASES = [
    *(
        Case(f"{stage} killed and resumed: {layout_name(world, zero)}", "equal to the uninterrupted run, bit for bit", partial(supervised, stage, world, zero), "real processes, SIGKILL at chosen points")
        for stage in ("sft", "reward", "dpo") for world, zero in LAYOUTS
    ),
    *(
        Case(f"ppo killed and resumed: {layout_name(world, zero)}", "equal to the uninterrupted run, bit for bit", partial(ppo, world, zero), "real processes, SIGKILL at chosen points")
        for world, zero in LAYOUTS
    ),
    *(
        Case(
            f"ppo killed and resumed, full training: {layout_name(2, zero)}{', optimizer in main memory' * offload}", "equal to the uninterrupted run, bit for bit",
            partial(ppo, 2, zero, adapters=False, offload=offload), "real processes, SIGKILL at chosen points",
        )
        for zero, offload in [(3, False), (2, True), (3, True)]
    ),
]  # fmt: skip
