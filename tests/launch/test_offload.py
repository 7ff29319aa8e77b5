"""ZeRO with what the machine files `zero2_offload` and `zero3_offload` keep in main memory, on two processes: all stages give what one process gives.

On a CPU everything is in main memory; what is tested is that DeepSpeed's other optimizer (compiled at its first start: a minute), buffers and paths of gradients
give the same numbers.
"""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
import yaml

from stages.registry import Registry
from tests.launch import ppo_zero_worker, zero_worker
from tests.launch.test_ppo_zero import differences
from tests.launch.test_zero import TOLERANCE, results, tensors
from tests.stage import ppo_runs
from tests.stage.runs import ENVIRONMENT, ROOT

SUPERVISED = ("sft-full", "reward-full", "dpo-lora")


def launch(folder, zero, worker, *arguments):
    """Run a worker on two processes under ZeRO with the offload settings of the GPU's machine file."""
    here, there = (yaml.safe_load((ROOT / "configs" / "accelerate" / f"{name}.yaml").read_text()) for name in (f"cpu_zero{zero}", f"zero{zero}_offload"))
    here["deepspeed_config"] = there["deepspeed_config"]
    assert here["deepspeed_config"]["offload_optimizer_device"] == "cpu"
    machine = folder / f"offload{zero}.yaml"
    machine.write_text(yaml.safe_dump(here))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(machine), "--main_process_port", "0", "-m", worker, str(folder), f"offload{zero}", *arguments]
    done = subprocess.run(command, env=ENVIRONMENT | {"TOKENIZERS_PARALLELISM": "false"}, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-5000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = zero_worker.prepare(tmp_path_factory.mktemp("offload"))
    one = [sys.executable, "-m", "tests.launch.zero_worker", str(folder), "one", *SUPERVISED]
    done = subprocess.run(one, env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("zero", [2, 3])
def test_supervised_stages(place, zero):
    launch(place, zero, "tests.launch.zero_worker", *SUPERVISED)
    for case in SUPERVISED:
        (one, expected), (two, found) = (results(place, case, label) for label in ("one", f"offload{zero}"))
        assert [line.keys() for line in one] == [line.keys() for line in two]
        for first, second in zip(one, two, strict=True):
            assert second == pytest.approx(first, rel=TOLERANCE, abs=1e-6), case
        mine, theirs = tensors(expected), tensors(found)
        assert mine.keys() == theirs.keys()
        assert all((theirs[name] - tensor).norm() <= TOLERANCE * tensor.norm() + 1e-9 for name, tensor in mine.items()), case


@pytest.fixture(scope="module")
def policies(tmp_path_factory):
    folder = ppo_runs.workspace(tmp_path_factory.mktemp("ppo"))
    ppo_runs.publish_reward(folder, "whole")
    ppo_zero_worker.work(folder, "one", ["full"])
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize("zero", [2, 3])
def test_ppo(policies, zero):
    """The first iteration trains the value function alone: the policy's optimizer sleeps, and its buffers for gradients stay."""
    launch(policies, zero, "tests.launch.ppo_zero_worker", "full")
    found = differences(policies, "full", f"offload{zero}")
    assert max(found.values()) < TOLERANCE, sorted(found.items(), key=lambda item: -item[1])[:4]
    one, two = (ppo_runs.weights(Registry(policies / "registry").resolve(f"ppo/full-{label}")) for label in ("one", f"offload{zero}"))
    assert max(float((one[name] - two[name]).norm() / one[name].norm().clamp(min=1e-9)) for name in one) < TOLERANCE
