"""PPO under ZeRO-1, 2 and 3 on two processes, started by a real `accelerate launch`, gives what one process gives with the same batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from configs.errors import UserError
from configs.schema import PPOStage
from stages.ppo.train import start
from stages.ppo.zero import saves
from stages.ppo.zero.engines import zero_of_machine
from stages.registry import Registry
from tests.launch.ppo_zero_worker import cases, work
from tests.stage.ppo_runs import metrics, publish_reward, settings, weights, workspace

ROOT = Path(__file__).resolve().parents[2]
CASES = {1: ["full", "lora", "head", "averaged"], 2: ["full", "lora", "head", "averaged"], 3: ["full", "lora", "head", "layer"]}
ONLY = {"layer": {3}, "averaged": {1, 2}}  # sampling layer by layer is there for split weights alone; averages are refused for them


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Everything once in this process."""
    folder = workspace(tmp_path_factory.mktemp("zero"))
    publish_reward(folder, "whole")
    publish_reward(folder, "adapter", lora=True)
    publish_reward(folder, "adapter-2", lora=True, seed=9, mean=-1.0, std=0.5)
    work(folder, "one", [])
    return folder


@pytest.fixture(scope="module", params=CASES)
def stage(request, place):
    """Everything in two processes under a ZeRO stage, in one launch."""
    environment = {k: v for k, v in os.environ.items() if k != "MASTER_PORT"}
    environment |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    machine = ROOT / f"configs/accelerate/cpu_zero{request.param}.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(machine), "--main_process_port", "0", "-m"]
    label = f"two{request.param}"
    done = subprocess.run(
        [*command, "tests.launch.ppo_zero_worker", str(place), label, *CASES[request.param]], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return request.param


def differences(place, case, label):
    """The largest difference of each metric between one process and two, relative to the number or to a hundredth where that is more."""
    one, two = (metrics(cases(place, name)[case]) for name in ("one", label))
    assert [line["iteration"] for line in one] == [line["iteration"] for line in two]
    found = {}
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for name in (name for name in a if "gap" not in name):  # a gap is rounding itself
            found[name] = max(found.get(name, 0.0), abs(a[name] - b[name]) / max(abs(a[name]), 1e-2))
    return found


@pytest.mark.parametrize("case", ["full", "lora", "head", "layer", "averaged"])
def test_losses_norms_and_weights_are_those_of_one_process(place, stage, case):
    """Three iterations of four optimizer steps, clipped apart, the first with the value function alone; rollouts and evaluations too."""
    if case not in CASES[stage]:
        assert stage not in ONLY[case]
        return
    found = differences(place, case, f"two{stage}")
    assert {"policy/loss", "value/loss", "policy/grad_norm", "value/grad_norm"} <= found.keys()
    assert max(found.values()) < 1e-4, sorted(found.items(), key=lambda item: -item[1])[:4]
    one, two = (weights(Registry(place / "registry").resolve(f"ppo/{case}-{label}")) for label in ("one", f"two{stage}"))
    assert one.keys() == two.keys()
    assert max(float((one[name] - two[name]).norm() / one[name].norm().clamp(min=1e-9)) for name in one) < 1e-4
    if case in ("full", "averaged"):
        start = weights(Registry(place / "registry").resolve("sft/one"))
        assert max(float((one[name] - start[name]).abs().max()) for name in one) > 1e-4, "weights that did not move prove nothing"


def test_what_each_process_holds_of_trained_and_frozen_models(place, stage):
    """At ZeRO-3 half of every model, and no process the whole of any; below it all of it."""
    for rank in (0, 1):
        facts = json.loads((place / f"facts-two{stage}-{rank}.json").read_text())
        for part, whole in (facts["full"]["trained"], facts["full"]["reference"], facts["full"]["scorers"][0]):
            assert part < 0.52 * whole if stage == 3 else part == whole


def test_trap_18_a_rollout_gathers_the_policy_once_and_nothing_else(place, stage):
    """Three rollouts; with adapters four evaluations as well. Not the value function's weights, nor another adapter's; layer by layer, nothing."""
    for rank in (0, 1):
        facts = json.loads((place / f"facts-two{stage}-{rank}.json").read_text())
        assert facts["full"]["gathered"] == ([facts["full"]["policy"]] * 3 if stage == 3 else [])
        assert facts["lora"]["gathered"] == ([facts["lora"]["policy"]] * 7 if stage == 3 else [])
        assert facts["lora"]["policy"] < facts["lora"]["trained"][1]
        assert stage < 3 or facts["layer"]["gathered"] == []


def test_a_process_whose_completions_are_done_samples_on_for_the_others(place, stage):
    """Layer by layer every token is a collective: processes have to wait for one another, and do."""
    idle = [json.loads((place / f"facts-two{stage}-{rank}.json").read_text())["idle"]["steps"] for rank in (0, 1)]
    assert max(idle) > 0 if stage == 3 else max(idle) == 0


def test_policies_published_from_shares_load_with_from_pretrained(place, stage):
    """In full, with all tensors; every test of weights reads files, this one what transformers and peft make of them."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    registry = Registry(place / "registry")
    full = AutoModelForCausalLM.from_pretrained(registry.resolve(f"ppo/full-two{stage}").model_dir)
    expected = weights(registry.resolve("ppo/full-one"))
    assert max(float((full.state_dict()[name] - expected[name]).abs().max()) for name in expected) < 1e-5
    base = AutoModelForCausalLM.from_pretrained(registry.resolve("sft/one").model_dir)
    PeftModel.from_pretrained(base, registry.resolve(f"ppo/lora-two{stage}").model_dir)


def test_a_save_of_other_shares_is_refused_with_both_named(tmp_path):
    (tmp_path / saves.SHARDS).write_text(json.dumps({"stage": 2, "processes": 4}))
    with pytest.raises(UserError, match=r"saved under ZeRO-2 on 4 process\(es\), and this run has ZeRO-3 on 1"):
        saves.check(tmp_path, 3)
    with pytest.raises(UserError, match="this run has no ZeRO"):
        saves.check(tmp_path, 0)
    (tmp_path / saves.SHARDS).unlink()
    saves.check(tmp_path, 0)
    with pytest.raises(UserError, match="saved under no ZeRO, and this run has ZeRO-1"):
        saves.check(tmp_path, 1)


@pytest.mark.parametrize(
    ("zero", "offload", "changes", "found"),
    [
        (2, "cpu", {"lora": {"rank": 2, "alpha": 4}}, "offload_optimizer_device cpu with one trunk"),
        (3, "nvme", {}, "offload_optimizer_device nvme"),
        (3, "none", {"offload_frozen": True}, "offload_frozen at ZeRO-3"),
        (3, "none", {"ema_decay": 0.9}, "ema_decay at ZeRO-3"),
        (3, "none", {"towards_start": 0.2}, "towards_start at ZeRO-3"),
        (3, "none", {"lora": {"rank": 2, "alpha": 4, "dora": True}}, "lora.dora at ZeRO-3"),
        (0, "none", {}, "ZeRO stage 0"),
    ],
)
def test_what_cannot_work_under_zero_is_named(monkeypatch, zero, offload, changes, found):
    for name, value in {"USE_DEEPSPEED": "true", "DEEPSPEED_ZERO_STAGE": zero, "DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": offload}.items():
        monkeypatch.setenv(f"ACCELERATE_{name}", str(value))
    with pytest.raises(UserError, match=found):
        zero_of_machine(PPOStage.model_validate(settings(Path("unused"), **changes)))


def test_fsdp_is_refused_with_the_machine_files_that_work(monkeypatch):
    monkeypatch.setattr("accelerate.Accelerator", lambda **_: SimpleNamespace(num_processes=2, distributed_type="FSDP"))
    with pytest.raises(UserError, match="does not run under FSDP; use a machine file with DeepSpeed ZeRO"):
        start(PPOStage.model_validate(settings(Path("unused"))))
