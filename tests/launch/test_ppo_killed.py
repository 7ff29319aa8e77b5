"""Kill -9 in a rollout, between two optimizer steps, while a save is written and after it, and resume after each: to the bit.

One and two processes, full training and adapters on one backbone, with adaptive KL and several minibatches.
"""

from __future__ import annotations

import signal
from pathlib import Path

import deepspeed  # noqa: F401 - imported before the forks, once
import pytest
import torch

from stages.registry import Registry
from tests.launch import ppo_mortal
from tests.launch.ppo_mortal import run_in_processes
from tests.launch.zero_mortal import environment
from tests.stage.ppo_runs import LORA, metrics, publish_reward, settings, weights, workspace

TRAIN = {"iterations": 5, "save_every": 2, "num_ppo_epochs": 2, "num_minibatches": 2, "micro_batch_size": 2}
MORTAL = {"kind": "python", "function": "tests.stage.ppo_runs:mortal"}
MODES = {"full": {"scorers": [MORTAL]}, "lora": {"lora": LORA, "scorers": [MORTAL, {"kind": "model", "checkpoint": "reward/adapter"}]}}
# Where each process in turn dies, the iterations whose metrics are then complete, and the saves there are. Each iteration has 4 optimizer steps.
DEATHS = [
    (("scoring", 2), 1, []),  # in the rollout of iteration 2, before any save
    (("step", 11), 2, ["checkpoint-2"]),  # from the start again: iteration 3, two of its four steps done
    (("seal", 1), 4, ["checkpoint-2"]),  # from 2: all files of the save after iteration 4 are there, their seal is not
    (("renamed", 1), 4, ["checkpoint-2", "checkpoint-4"]),  # from 2 again: the save after iteration 4 is whole
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = workspace(tmp_path_factory.mktemp("killed"))
    publish_reward(folder, "adapter", lora=True)
    return folder


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Forked processes must not wait for threads that were not forked with them."""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("mode", MODES)
def test_trap_14_killed_at_every_point_a_run_ends_as_the_uninterrupted_one_to_the_bit(place, mode, world):
    whole, killed = (settings(place, f"{mode}-{world}-{label}", TRAIN, adaptive_kl={"target": 1.0, "horizon": 100}, **MODES[mode]) for label in ("whole", "killed"))
    killed["name"] = whole["name"]
    assert run_in_processes(whole, world) == [0] * world
    for death, complete, saved in DEATHS:
        assert -signal.SIGKILL in run_in_processes(killed, world, death)
        assert len(metrics(killed)) == complete
        assert sorted(p.name for p in (Path(killed["output"]) / "resume").glob("checkpoint-*")) == saved
    assert run_in_processes(killed, world) == [0] * world
    assert metrics(killed) == metrics(whole)
    assert [line["iteration"] for line in metrics(whole)] == [1, 2, 3, 4, 5]
    assert len({line["objective/kl_coef"] for line in metrics(whole)}) == 5, "the controller moves, so that it has something to lose"
    straight, resumed = (weights(checkpoint) for checkpoint in Registry(whole["registry"]).list("ppo", whole["name"]))
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)


@pytest.mark.parametrize(("mode", "zero", "optimizer"), [("lora", 2, "none"), ("full", 2, "cpu")])
def test_killed_under_zero_a_run_ends_as_the_uninterrupted_one_to_the_bit(place, monkeypatch, mode, zero, optimizer):
    """Each process saves its own share of the optimizer; `make reliability` does this for every layout. AdamW steps twice for an optimizer step: once for the policy's group, once for the value function's."""
    monkeypatch.setattr(ppo_mortal, "environment", lambda *of: environment(*of) | {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": optimizer})
    whole, killed = (settings(place, f"zero-{mode}-{zero}-{optimizer}-{label}", TRAIN, adaptive_kl={"target": 1.0, "horizon": 100}, **MODES[mode]) for label in ("whole", "killed"))
    killed["name"] = whole["name"]
    assert run_in_processes(whole, 2, zero_stage=zero) == [0, 0]
    for death, complete, saved in [(("step", 2 * 8 + 3), 2, ["checkpoint-2"]), (("seal", 1), 4, ["checkpoint-2"]), (("renamed", 1), 4, ["checkpoint-2", "checkpoint-4"])]:
        assert -signal.SIGKILL in run_in_processes(killed, 2, death, zero_stage=zero)
        assert len(metrics(killed)) == complete
        assert sorted(p.name for p in (Path(killed["output"]) / "resume").glob("checkpoint-*")) == saved
    assert run_in_processes(killed, 2, zero_stage=zero) == [0, 0]
    assert metrics(killed) == metrics(whole)
    straight, resumed = (weights(checkpoint) for checkpoint in Registry(whole["registry"]).list("ppo", whole["name"]))
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)
