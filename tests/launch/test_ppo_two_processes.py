"""PPO on two processes, started by a real `accelerate launch` with the machine file that ships, gives what one process gives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from configs.errors import UserError
from configs.schema import PPOStage
from stages.ppo.train import start
from stages.registry import Registry
from tests.launch.ppo_worker import values_of, work
from tests.stage.ppo_runs import metrics, publish_reward, run, settings, weights, workspace
from tests.unit.test_ppo_update import module_of

ROOT = Path(__file__).resolve().parents[2]


def launch(*module_and_arguments):
    """accelerate launch with two CPU processes; the finished child."""
    environment = {k: v for k, v in os.environ.items() if k != "MASTER_PORT"} | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    machine = ROOT / "configs/accelerate/cpu_ddp.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(machine), "--main_process_port", "0", "-m"]
    return subprocess.run([*command, *map(str, module_and_arguments)], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Everything once in this process, and once in two."""
    folder = workspace(tmp_path_factory.mktemp("two"))
    publish_reward(folder, "whole")
    publish_reward(folder, "adapter", lora=True)
    work(folder, "one")
    done = launch("tests.launch.ppo_worker", folder, "two")
    assert done.returncode == 0, done.stderr
    return folder


def test_row_22_continuous_batching_on_two_processes_draws_other_samples_from_the_same_policy(place):
    """One stream per process: other completions than one process draws, each process's own, as near the forward as on one."""
    one, two = (metrics(values_of(place, "continuous", label)) for label in ("one", "two"))
    assert [line["iteration"] for line in two] == [1, 2, 3, 4, 5]
    assert all(line["rollout/sampler_gap"] < 1e-4 and line["rollout/importance_weight"] == pytest.approx(1, abs=1e-4) for line in one + two)
    assert one[0]["rollout/length"] != two[0]["rollout/length"] or one[0]["objective/score"] != two[0]["objective/score"]


@pytest.mark.parametrize("kind", ["copy", "lora"])
def test_row_14_one_update_of_a_fixed_rollout_is_the_same_for_any_processes_and_accumulation(place, kind):
    """Against one process with micro-batches of 3: of 1, and two processes with either; in full and with adapters."""
    from safetensors.torch import load_file

    expected, *others = (load_file(place / f"update-{kind}-{micro}-{count}.safetensors") for micro, count in ((3, 1), (1, 1), (3, 2), (1, 2)))
    start = {n: p.detach() for n, p in module_of(kind=kind).named_parameters() if p.requires_grad}
    assert max((expected[n] - start[n]).abs().max().item() for n in start) > 1e-3
    for found in others:
        assert found.keys() == expected.keys()
        for name in expected:
            tolerance = 1e-6 if not name.startswith("metric:") else 1e-5
            torch.testing.assert_close(found[name], expected[name], atol=tolerance, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("mode", ["full", "lora", "head", "mortal", "generate"])
def test_trap_4_row_14_two_processes_have_the_trajectory_of_one(place, mode):
    """Five iterations of four optimizer steps: every metric that no clock measured, within 1e-4."""
    one, two = (metrics(values_of(place, mode, label)) for label in ("one", "two"))
    assert [line["iteration"] for line in two] == [0, 1, 2, 3, 4, 5][mode != "lora" :]
    for a, b in zip(one, two, strict=True):
        for line in (a, b):
            line.pop("rollout/sampler_gap", None)  # rounding itself
        assert b == pytest.approx(a, rel=1e-4, abs=2e-5)
    assert len({line.get("objective/score") for line in one}) > 2, "scores that do not change prove nothing"
    first, second = (weights(Registry(place / "registry").resolve(f"ppo/{mode}-{label}")) for label in ("one", "two"))
    assert max((first[name] - second[name]).abs().max().item() for name in first) < 1e-4


def test_rows_23_and_24_two_processes_evaluate_and_publish_what_one_does(place):
    """The run with adapters is evaluated: the same completions in the same order, the same best policy."""
    one, two = (Path(values_of(place, "lora", label)["output"]) / "samples.jsonl" for label in ("one", "two"))
    mine, theirs = ([json.loads(line) for line in file.read_text().splitlines()] for file in (one, two))
    assert len(theirs) == len(mine) == 4 * 8 * 3
    assert [(row["iteration"], row["prompt"], row["completion"]) for row in theirs] == [(row["iteration"], row["prompt"], row["completion"]) for row in mine]
    facts = [Registry(place / "registry").resolve(f"ppo/lora-{label}").info("stage_info")["run"] for label in ("one", "two")]
    assert facts[0]["published_iteration"] == facts[1]["published_iteration"]


def test_row_14_one_iteration_gives_the_same_new_weights_on_two_processes(place):
    first, second = (weights(Registry(place / "registry").resolve(f"ppo/once-{label}")) for label in ("one", "two"))
    start = weights(Registry(place / "registry").resolve("sft/one"))
    assert max((first[name] - start[name]).abs().max().item() for name in first) > 1e-4
    assert max((first[name] - second[name]).abs().max().item() for name in first) < 1e-6


def test_trap_14_a_run_of_two_processes_that_was_killed_ends_as_the_uninterrupted_one(place, monkeypatch):
    """SIGKILL of every rank in iteration 4; one process is refused, for its sums would differ; two go on to the same bits."""
    whole = values_of(place, "mortal", "two")
    values = whole | {"output": str(place / "killed"), "name": "killed"}
    config = place / "killed.json"
    config.write_text(json.dumps(values))
    monkeypatch.setenv("PPO_TEST_DIES_AT", "kill:4")
    assert launch("stages.ppo", "--config", config).returncode != 0
    monkeypatch.delenv("PPO_TEST_DIES_AT")
    assert len(metrics(values)) == 3
    with pytest.raises(UserError, match="processes: 2 → 1"):
        run(values)
    again = launch("stages.ppo", "--config", config)
    assert again.returncode == 0, again.stderr
    assert "continuing from checkpoint-2" in again.stdout
    assert again.stdout.count("published ppo/") == 1
    assert metrics(values) == metrics(whole)
    resumed, straight = (weights(Registry(place / "registry").resolve(f"ppo/{name}")) for name in ("killed", "mortal-two"))
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)


def test_a_batch_that_two_processes_cannot_share_is_named(place, monkeypatch):
    accelerator = SimpleNamespace(num_processes=2, distributed_type="MULTI_CPU")
    monkeypatch.setattr("accelerate.Accelerator", lambda **_: accelerator)
    values = settings(place, "odd", {"rollout_batch_size": 10, "num_minibatches": 2})
    with pytest.raises(UserError, match=r"rollout_batch_size 10 is not a multiple of train.num_minibatches 2 x 2 process\(es\)"):
        start(PPOStage.model_validate(values))
