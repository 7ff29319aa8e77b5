"""Numbers gone bad: what is injected is skipped or undone, nothing broken is kept, healthy runs are left alone, and what watching costs."""

from __future__ import annotations

import json
import math
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.schema import Guard as GuardConfig
from stages.guard import verdict
from stages.guard.skip import skip_if
from stages.registry.finite import nonfinite_tensors
from stages.training.saves import problem, saves
from tests.launch.ppo_numbers import run_with_faults
from tests.launch.zero_mortal import run_in_two
from tests.reliability.case import Case, Measured
from tests.stage import ppo_runs, runs
from tests.stage.numbers import KINDS, injected, same

STAGES = ("sft", "reward", "dpo")
JUDGED_EARLY = 4  # good steps before a spike is looked for, instead of 32, so that runs may be short


def skipped_and_undone(folder: Path, seed: int, quick: bool) -> Measured:
    """Each fault in each stage that TRL trains: the step leaves weights and moments, or the save before it comes back; the result is finite."""
    runs.workspace(folder)
    bad = []
    stages = STAGES[:1] if quick else STAGES
    for stage in stages:
        for kind in KINDS:
            values = runs.settings(folder, stage, {"max_steps": 8, "save_every": 3, "eval_every": 8}, name=kind, output=str(folder / f"{stage}-{kind}"), seed=seed)
            values["guard"] = {"max_skipped_in_row": 2}
            with pytest.MonkeyPatch.context() as patch, injected(kind, {5}) as recorded:
                patch.setattr(verdict, "JUDGED_AFTER", JUDGED_EARLY)
                published = runs.weights(runs.run(stage, values))
            steps = recorded[0].steps
            kept = same(steps[6], steps[3]) if kind == "weight" else same(steps[5], steps[4]) and not same(steps[6], steps[5])
            if not kept or not all(torch.isfinite(tensor).all() for tensor in published.values()):
                bad.append(f"{stage} {kind}")
    count = len(stages) * len(KINDS)
    return Measured(f"{count - len(bad)} of {count}", not bad, f"weights, moments and step counts compared to the bit; {', '.join(bad) or 'none differed'}")


def ppo_undone(folder: Path, seed: int, quick: bool) -> Measured:
    """Two processes, faults on the second one: under DDP and ZeRO both skip the step and both go back."""
    bad = []
    kinds = (2,) if quick else (0, 2, 3)
    for zero_stage in kinds:
        place = folder / f"zero{zero_stage}"
        values = ppo_runs.settings(ppo_runs.workspace(place), "two", {"iterations": 6, "num_ppo_epochs": 1, "save_every": 1}, evaluation=None, seed=seed)
        ended, seen = run_with_faults(values, zero_stage, place)
        lines = [json.loads(line) for line in (place / "two" / "metrics.jsonl").read_text().splitlines()] if ended == [0, 0] else []
        back = [line.get("train/back_to_iteration") for line in lines]
        if ended != [0, 0] or seen != [{"back": True, "moved": True}] * 2 or back != [None, None, None, 3, None, None]:
            bad.append(f"ZeRO-{zero_stage}: ended {ended}, {seen}, {back}")
    return Measured(f"{len(kinds) - len(bad)} of {len(kinds)}", not bad, "; ".join(bad) or "no ZeRO, ZeRO-2, ZeRO-3; weights and optimizer's state compared to the bit on both ranks")


def one_rank(folder: Path, seed: int, quick: bool) -> Measured:
    """SFT in two processes, whose second has a batch and later a weight of NaN."""
    from tests.launch.test_numbers_in_two import faults_on_rank_1

    bad = []
    kinds = (2,) if quick else (0, 2, 3)
    for zero_stage in kinds:
        place = folder / f"zero{zero_stage}"
        place.mkdir()
        train = {"max_steps": 10, "save_every": 4, "eval_every": 10, "micro_batch_size": 2}
        values = runs.settings(runs.workspace(place, rows=40), "sft", train, name="two", output=str(place / "out"), guard={"max_skipped_in_row": 2}, seed=seed)
        ended = run_in_two("sft", values, zero_stage, around=partial(faults_on_rank_1, place))
        seen = [json.loads(file.read_text()) for file in sorted(place.glob("seen-*.json"))]
        if ended != [0, 0] or [found["back"] for found in seen] != [True, True] or not all(found["unchanged"][2] for found in seen):
            bad.append(f"ZeRO-{zero_stage}: ended {ended}, {seen}")
    return Measured(f"{len(kinds) - len(bad)} of {len(kinds)}", not bad, "; ".join(bad) or "no ZeRO, ZeRO-2, ZeRO-3; step 3 skipped and 5 to 7 undone on both ranks alike")


def nothing_broken_is_kept(folder: Path, seed: int, quick: bool) -> Measured:
    """Runs whose weights break at every step in turn, saving after each: every save that verifies is searched for NaN and infinity."""
    runs.workspace(folder)
    searched = broken = 0
    for step in range(2, 4 if quick else 6):
        values = runs.settings(folder, "sft", {"max_steps": 8, "save_every": 1, "eval_every": 8}, name=f"at-{step}", output=str(folder / f"at-{step}"), seed=seed)
        from stages.training import trainer_saves

        found: list[Path] = []
        with pytest.MonkeyPatch.context() as patch, injected("weight", {step, step + 1}):
            store = trainer_saves.saves.store

            def kept(where: Path, *arguments: Any, store: Any = store, found: list[Path] = found, **keywords: Any) -> Any:
                why = store(where, *arguments, **keywords)
                found.extend(save for save in saves(where) if problem(save) is None)
                for save in saves(where):
                    found_in = [tensor for file in save.glob("*.safetensors") for tensor in nonfinite_tensors(file)]
                    if problem(save) is None and found_in:
                        raise AssertionError(f"{save} holds {found_in}")
                return why

            patch.setattr(trainer_saves.saves, "store", kept)
            try:
                checkpoint = runs.run("sft", values)
                broken += any(not torch.isfinite(tensor).all() for tensor in runs.weights(checkpoint).values())
            except AssertionError:
                broken += 1
            except Exception as error:
                if type(error).__name__ != "UserError":
                    raise
        searched += len(found)
    return Measured(broken, broken == 0 and searched > 0, f"{searched} looks at saves after each was made, and at what was published")


def healthy_runs(folder: Path, seed: int, quick: bool) -> Measured:
    """Small batches, few rows, many passes: losses go to nearly nothing, which is where a careless limit would skip hard rows."""
    runs.workspace(folder)
    skipped, highest, steps = 0, -math.inf, 0
    for stage in STAGES[:1] if quick else STAGES:
        train = {"max_steps": 60 if quick else 100, "batch_size": 2, "micro_batch_size": 2, "eval_every": 150, "save_every": 150, "learning_rate": 3e-3, "warmup": 0.1}
        values = runs.settings(folder, stage, train, name="healthy", output=str(folder / f"healthy-{stage}"), seed=seed)
        runs.run(stage, values)
        lines = [json.loads(line) for line in (folder / f"healthy-{stage}" / "metrics.jsonl").read_text().splitlines()]
        lines = [line for line in lines if "grad_norm" in line]
        skipped, steps = skipped + lines[-1]["train/skipped_steps"], steps + len(lines)
        highest = max(highest, *(highest_score([line[key] for line in lines]) for key in (f"{stage}/loss", "grad_norm")))
    return Measured(skipped, skipped == 0, f"{steps} steps of two rows; the highest score of any loss or norm was {highest:.1f} deviations, the limit is 10")


def highest_score(values: list[float]) -> float:
    """How many robust deviations above the median of the last steps' logarithms a series has come at most, as the guard reckons."""
    logs = [math.log(abs(value)) for value in values if value]
    highest = -math.inf
    for i in range(verdict.JUDGED_AFTER, len(logs)):
        before = sorted(logs[max(0, i - verdict.WINDOW) : i])
        median = before[(len(before) - 1) // 2]
        spread = sorted(abs(x - median) for x in before)[(len(before) - 1) // 2] * verdict.MAD_TO_DEVIATION
        highest = max(highest, (logs[i] - median) / max(spread, verdict.LEAST_SPREAD))
    return highest


def cost(folder: Path, seed: int, quick: bool) -> Measured:
    """Steps of a fused AdamW over 8 million parameters, watched and not, in turn; the median of both."""
    torch.manual_seed(seed)
    parameter = torch.nn.Parameter(torch.randn(8_000_000))
    parameter.grad = torch.randn_like(parameter)
    optimizer = torch.optim.AdamW([parameter], fused=True)
    guard = verdict.Guard(GuardConfig(), ("loss", "gradient"), "cpu")
    taken: dict[bool, list[float]] = {True: [], False: []}
    judged = []
    for number in range(20 if quick else 200):
        for watched in (number % 2 == 0, number % 2 == 1):
            optimizer.found_inf = None  # type: ignore[attr-defined]
            began = time.perf_counter()
            if watched:
                skip_if(guard.judge(number, torch.tensor([2.0, 1.0])), optimizer)
                judged.append(time.perf_counter() - began)
            optimizer.step()
            taken[watched].append(time.perf_counter() - began)
        guard.unread.clear()
    judge = statistics.median(judged) * 1e6
    ratio = statistics.median(taken[True]) / statistics.median(taken[False])
    return Measured(f"{judge:.0f} µs", judge < 1000, f"1 % of a step of {judge / 10:.0f} ms; the optimizer's step alone takes {ratio:.2f} times as long watched as not (8M parameters, one thread)")


CASES = [
    Case("NaN in a batch, a gradient, a weight, and a loss spike: SFT, reward model, DPO", "all skipped or undone, to the bit", skipped_and_undone, "in-process, faults by hooks in real runs"),
    Case("SFT on two processes, NaN on one: DDP, ZeRO-2, ZeRO-3", "all skipped and undone on both ranks", one_rank, "real processes, faults by hooks"),
    Case("PPO on two processes, NaN on one: DDP, ZeRO-2, ZeRO-3", "all skipped and undone on both ranks", ppo_undone, "real processes, faults by hooks"),
    Case("non-finite saves and checkpoints", "0", nothing_broken_is_kept, "in-process, faults by hooks in real runs"),
    Case("healthy runs of tiny data: steps skipped", "0", healthy_runs, "real runs"),
    Case("cost of judging a step on the CPU", "under 1 ms", cost, "in-process"),
]
