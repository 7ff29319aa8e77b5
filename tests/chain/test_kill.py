"""kill -9 in every stage of a chain, the same command again: it goes on where it was and ends with the very same weights.

One chain runs without a break; another is killed seven times, at moments drawn from a seed. What the second publishes must be what the
first published, bit for bit.
"""

from __future__ import annotations

import contextlib
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from stages.registry import Checkpoint, Registry
from tests.stage.runs import ENVIRONMENT, ROOT
from tests.tiny import tiny_data, tiny_model

STAGES = ("sft", "reward", "dpo", "ppo")
STEPS = 16
SEED = 4
PATIENCE = 120.0  # seconds to wait for a moment on a busy machine
CHAIN = """
name: tiny
base: {folder}/base
output: {output}
max_length: 64
template: plain
machine: cpu
split: {{validation: 0.1, test: 0.2}}
sft: {{data: {folder}/demos.jsonl, train: {train}}}
reward: {{data: {folder}/pairs.jsonl, train: {train}}}
dpo: {{data: {folder}/pairs.jsonl, train: {train}}}
ppo:
  prompts: {folder}/prompts.jsonl
  sampling: {{max_new_tokens: 8}}
  train: {{iterations: 16, rollout_batch_size: 16, micro_batch_size: 8, num_ppo_epochs: 2, num_minibatches: 2, learning_rate: 1e-3, save_every: 2}}
eval: {{prompts: {folder}/prompts.jsonl, samples_per_prompt: 4, sampling: {{max_new_tokens: 24}}, scorers: [{{kind: keyword, words: [a, e]}}]}}
"""
TRAIN = "{max_steps: 16, batch_size: 16, micro_batch_size: 8, learning_rate: 1e-3, log_every: 1, eval_every: 4, save_every: 2}"


@dataclass(frozen=True)
class Kill:
    """Who is killed in which stage: everything, the stage's own process, or `align run` alone. `steps`: between which a moment is drawn
    (0: while it starts up; of the evaluation, the model it measures)."""

    stage: str
    whom: str
    steps: tuple[int, int]


KILLS = [
    Kill("sft", "everything", (3, 12)), Kill("reward", "stage", (0, 0)), Kill("reward", "everything", (3, 12)), Kill("dpo", "align", (3, 7)),
    Kill("dpo", "everything", (9, 13)), Kill("ppo", "everything", (3, 12)), Kill("eval", "everything", (1, 3)),
]  # fmt: skip


def write_chain(folder: Path, output: str) -> Path:
    """A chain file with its own working folder, on the data and the model of `folder`."""
    file = folder / f"{output}.yaml"
    file.write_text(CHAIN.format(folder=folder, output=folder / output, train=TRAIN))
    return file


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny base and a few dozen rows."""
    folder = tmp_path_factory.mktemp("kill")
    tiny_model(folder / "base")
    tiny_data(folder, "mnopqr")
    return folder


@pytest.fixture(scope="module")
def unbroken(folder: Path) -> Path:
    """The working folder of a chain that ran in one go."""
    done = subprocess.run(command(write_chain(folder, "unbroken")), env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "unbroken"


def command(chain: Path) -> list[str]:
    return [sys.executable, "-m", "launch.cli", "run", str(chain)]


def start(chain: Path, said: Path) -> subprocess.Popen[bytes]:
    """`align run CHAIN`, its output in the file `said`."""
    with said.open("wb") as stream:
        return subprocess.Popen(command(chain), env=ENVIRONMENT, cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True)


def wait_for(moment: Callable[[], Any], run: subprocess.Popen[bytes], what: str, said: Path) -> None:
    """Until `moment()` is true."""
    until = time.monotonic() + PATIENCE
    while not moment():
        assert run.poll() is None, f"align run ended ({run.returncode}) before {what}:\n{said.read_text()}"
        assert time.monotonic() < until, f"{what} did not come:\n{said.read_text()}"
        time.sleep(0.003)


def step_of(output: Path, stage: str) -> int:
    """The last step in a stage's metrics; of the evaluation, the model it is at."""
    if stage == "eval":
        log = output / "logs" / "eval.log"
        return log.read_text().count("\neval ") if log.exists() else 0
    file = output / stage / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    try:
        return max((int(row.get("step", row.get("iteration", 0))) for row in map(json.loads, lines)), default=0)
    except ValueError:  # a line that is just being written
        return 0


def kill(run: subprocess.Popen[bytes], whom: str) -> None:
    """SIGKILL, and wait until the processes are gone (those whose parent was killed are killed by the kernel)."""
    align = psutil.Process(run.pid)
    below = align.children(recursive=True)
    for victim in {"everything": [align, *below], "stage": below, "align": [align]}[whom]:
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.kill()
    run.wait(timeout=60)
    _, alive = psutil.wait_procs(below, timeout=30)
    assert not alive, f"{alive} outlived what was killed"


def published(output: Path) -> dict[str, Checkpoint]:
    """Stage -> checkpoint; each stage has published once at most, and each checkpoint is whole."""
    if not (output / "registry" / "registry.json").exists():
        return {}
    registry = Registry(output / "registry", create=False)
    found = registry.list()
    assert registry.damaged() == {}
    assert len({checkpoint.stage for checkpoint in found}) == len(found), "a finished stage was repeated"
    assert [registry.verify(checkpoint.id, deep=True) for checkpoint in found] == [[]] * len(found)
    return {checkpoint.stage: checkpoint for checkpoint in found}


def killed_run(chain: Path, output: Path, plan: Kill, moment: random.Random) -> None:
    """Run the chain, kill it in the middle of a stage, and look at what is left."""
    said = said_by(chain, plan)
    earliest = step_of(output, plan.stage) + 1 if plan.stage != "eval" else 1  # a second kill comes after what the first one saw
    run = start(chain, said)
    try:
        if plan.steps == (0, 0):
            wait_for(lambda: stage_process(run, plan.stage), run, f"the process of {plan.stage}", said)
            time.sleep(moment.uniform(0, 2))
        else:
            target = max(earliest, moment.randint(*plan.steps))
            wait_for(lambda: step_of(output, plan.stage) >= target, run, f"step {target} of {plan.stage}", said)
            time.sleep(moment.uniform(0, 0.05))
    except BaseException:
        kill(run, "everything")
        raise
    kill(run, plan.whom)
    finished = published(output)
    assert plan.stage not in finished, "it was killed too late to be a test"
    assert list(finished) == sorted(STAGES[: (*STAGES, "eval").index(plan.stage)])
    assert not (output / "summary.json").exists()
    if plan.whom == "stage":
        assert run.returncode == 137
        assert f"error: {plan.stage} was killed by signal 9" in said.read_text()
        assert f"align run {chain}" in said.read_text()


def said_by(chain: Path, plan: Kill) -> Path:
    """Where the output of a run that was killed is kept."""
    return chain.with_suffix(f".{plan.stage}.{plan.whom}.txt")


def stage_process(run: subprocess.Popen[bytes], stage: str) -> bool:
    try:
        return any(f"stages.{stage}" in child.cmdline() for child in psutil.Process(run.pid).children(recursive=True))
    except psutil.Error:  # one of them has just ended
        return False


def sealed_saves(output: Path, stage: str) -> list[str]:
    return [file.parent.name for file in (output / stage / "resume").glob("checkpoint-*/sealed.json")]


def test_killed_in_every_stage_it_ends_with_the_same_weights(folder: Path, unbroken: Path) -> None:
    chain, output = write_chain(folder, "killed"), folder / "killed"
    moment = random.Random(SEED)
    continued = []
    for number, plan in enumerate(KILLS):
        killed_run(chain, output, plan, moment)
        saves = sealed_saves(output, plan.stage)
        if number + 1 < len(KILLS):
            continued.append((plan.stage, saves, said_by(chain, KILLS[number + 1])))
    done = subprocess.run(command(chain), env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(f"] {stage}: skip (" in done.stdout for stage in STAGES), done.stdout
    assert (output / "summary.json").exists()

    for stage, saves, said in continued:
        text = said.read_text()
        assert f"] {stage}: continue (was interrupted)" in text
        assert not saves or f"[{stage}] resume: continuing from checkpoint-" in text, f"{stage} began anew although it had {saves}"
    assert {stage for stage, saves, _ in continued if saves} == set(STAGES), "each stage was continued from a save"
    assert_same_results(unbroken, output)


def assert_same_results(unbroken: Path, killed: Path) -> None:
    """Weights, what the reward model is centred by, metrics per step, and the evaluation's figures are equal."""
    ours, theirs = published(killed), published(unbroken)
    assert set(ours) == set(theirs) == set(STAGES)
    for stage in STAGES:
        hashes = [found[stage].manifest["files"]["model/model.safetensors"]["blake3"] for found in (ours, theirs)]
        assert hashes[0] == hashes[1], f"{stage}: other weights than without a kill"
        assert ours[stage].info("stage_info").get("mean") == theirs[stage].info("stage_info").get("mean")
        assert steps(killed, stage) == steps(unbroken, stage)
        assert not (killed / stage / "resume").exists() or not sealed_saves(killed, stage), "the saves of a published stage are dropped"
    figures = [json.loads((output / "eval" / "results.json").read_text())["models"] for output in (killed, unbroken)]
    for label in figures[0]:
        assert figures[0][label]["score"] == figures[1][label]["score"]
        assert figures[0][label]["kl"] == figures[1][label]["kl"]


def steps(output: Path, stage: str) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl without what a clock measured."""
    rows = map(json.loads, (output / stage / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in row.items() if not key.startswith("time/") and "per_second" not in key} for row in rows]
