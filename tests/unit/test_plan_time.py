"""The plan's hours: what it hands to the time model, and what it says of how far to trust them."""

from __future__ import annotations

import json

import pytest

from configs.errors import UserError
from configs.load import load
from launch.cli import main
from launch.plan.correct import corrected
from launch.plan.estimate import estimate
from launch.plan.gpus import parse_gpus
from launch.plan.host import host_of, moved
from launch.plan.make import layout_for, plan_stage, works
from launch.plan.sources import Sources
from launch.plan.timing import facts_of, hardware_of
from launch.plan_cli import _node_memory
from launch.scale import scale
from launch.scale.collectives import gather_or_scatter
from tests.tiny import tiny_config


def ppo_file(folder):
    """A PPO config over a config.json alone."""
    tiny_config(layers=2, hidden=256).save_pretrained(folder / "base")
    values = {
        "name": "tiny", "init_from": str(folder / "base"), "max_length": 64, "registry": str(folder / "registry"), "prompts": "none.jsonl",
        "scorers": [{"kind": "length", "target": 5}], "sampling": {"max_new_tokens": 16, "generate_batch_size": 4}, "train": {"rollout_batch_size": 16, "micro_batch_size": 2},
    }  # fmt: skip
    file = folder / "ppo.yaml"
    file.write_text(json.dumps(values))
    return file


def planned(file, stage, machine, gpus, *overrides):
    """(work, layout, device) of a stage's config."""
    count, device = parse_gpus(gpus)
    config = load(file, stage, list(overrides))
    ((work, layout),) = works(config, stage, lambda cfg: layout_for(cfg, machine, count, device, 1), Sources(), None)
    return work, layout, device


@pytest.mark.parametrize(("gather", "times"), [("rollout", 1), ("layer", 16)])
def test_a_rollout_layer_by_layer_pays_for_every_token(tmp_path, gather, times):
    """`engine.gather: layer` had the time of gathering once: the policy's all-gather, here once for each of 16 tokens."""
    work, layout, device = planned(ppo_file(tmp_path), "ppo", "zero3", "4x80GB", f"engine={{gather: {gather}}}")
    facts, hardware = facts_of(work, layout), hardware_of(device)
    rollout = next(phase for phase in scale(facts, [4], hardware)[0].phases if phase.name == "rollout")
    one = gather_or_scatter(facts.policy.parameters * 2.0, 4, hardware, facts.policy.layers)
    assert rollout.network == pytest.approx(times * one)


def test_the_plan_says_how_far_published_times_are_from_its_model(tmp_path, capsys):
    assert main(["plan", str(ppo_file(tmp_path)), "--gpus", "4x80GB", "--machine", "zero2", "--json"]) == 0
    notes = json.loads(capsys.readouterr().out)["notes"]
    assert any("10 DeepSpeed-Chat's published times of PPO the model is off by 28% in the median, -47% to +136%" in note for note in notes)


def sft_file(folder):
    """An SFT config over a config.json alone: 4 rows a step of 4 processes and two micro-batches each."""
    tiny_config(layers=2, hidden=256).save_pretrained(folder / "base")
    values = {"name": "tiny", "init_from": str(folder / "base"), "max_length": 64, "registry": str(folder / "registry"), "data": "none.jsonl", "train": {"batch_size": 8, "micro_batch_size": 1}}
    file = folder / "sft.yaml"
    file.write_text(json.dumps(values))
    return file


def test_offloaded_state_is_in_main_memory_of_the_node(tmp_path):
    """Four processes hold a fourth each, a node of them all of it: 2 bytes a weight, 12 of float32 weight and moments, 4 + 2 of gradients."""
    work, layout, _ = planned(sft_file(tmp_path), "sft", "zero3_offload", "4x80GB")
    weights = facts_of(work, layout).policy.parameters
    assert host_of(work, layout) == {"parameters": 2 * weights, "gradients": 6 * weights, "optimizer": 12 * weights}
    # a gradient out and a weight in, and all weights in for two passes of two micro-batches: 4 + 8 bytes a weight, a fourth of it
    assert moved(work, layout) == pytest.approx(12 * weights / 4, abs=4)
    work, layout, _ = planned(tmp_path / "sft.yaml", "sft", "zero2_offload", "4x80GB")
    largest = 256 * 512  # the MLP's, beside 259 tokens
    assert host_of(work, layout) == {"gradients": 6 * weights, "optimizer": 12 * weights, "buffers": 4 * 2 * largest}
    work, layout, _ = planned(tmp_path / "sft.yaml", "sft", "zero3", "4x80GB")
    assert host_of(work, layout) == {}


def test_what_ppo_keeps_of_the_policy_to_publish_is_the_policy_s_alone(tmp_path):
    """The average was counted for the value function too. The starting weights lie in main memory: on a CPU beside the rest, of a node of four GPUs four times."""
    extras = ("ema_decay=0.9", "towards_start=0.2")
    work, layout, _ = planned(ppo_file(tmp_path), "ppo", "cpu_ddp", "2xcpu", *extras)
    weights = facts_of(work, layout).policy.parameters
    found = estimate(work.job, work.cfg, layout)
    assert (found.most("average"), found.most("starting weights")) == (4 * weights, 4 * weights)
    assert host_of(work, layout) == {}
    work, layout, _ = planned(ppo_file(tmp_path), "ppo", "gpu_ddp", "4x80GB", *extras)
    assert estimate(work.job, work.cfg, layout).most("starting weights") == 0
    assert host_of(work, layout) == {"starting weights": 4 * 4 * weights}
    work, layout, _ = planned(ppo_file(tmp_path), "ppo", "zero2_offload", "4x80GB", *extras)
    assert host_of(work, layout)["starting weights"] == 4 * 4 * weights


def test_ppo_s_weights_are_float32_under_zero_too(tmp_path):
    """PPO gives DeepSpeed no bf16 section and computes under autocast; 2 bytes a weight were planned of the 4 that there are."""
    for stage, file, width in (("ppo", ppo_file(tmp_path), 4), ("sft", sft_file(tmp_path), 2)):
        work, layout, _ = planned(file, stage, "zero2", "4x80GB", "train.precision=bf16")
        weights = facts_of(work, layout).policy.parameters
        assert estimate(work.job, work.cfg, layout).most("parameters") == width * weights


def test_a_node_without_that_memory_does_not_fit(tmp_path, capsys):
    words = ["plan", str(sft_file(tmp_path)), "--gpus", "4x80GB", "--machine", "zero3_offload", "--json"]
    found = []
    for node in ([], ["--node-memory", "1GB"], ["--node-memory", "0.001GB"]):
        assert main([*words, *node]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert [each["stages"][0]["fits"] for each in found] == [True, True, False]
    assert found[0]["stages"][0]["host_bytes"]["total"] > 10**6
    assert any("give --node-memory" in note for note in found[0]["notes"])
    assert any("the hours leave out what offloading costs" in note for note in found[0]["notes"])
    assert any("too little for sft" in note for note in found[2]["notes"])
    assert (_node_memory("2GiB"), _node_memory("2GB"), _node_memory("2")) == (2 * 2**30, 2 * 10**9, 2 * 10**9)
    assert main([*words, "--node-memory", "much"]) == 2
    assert "--node-memory: found 'much'" in capsys.readouterr().err


@pytest.mark.parametrize(("machine", "engines"), [("cpu_zero3", 2), ("cpu_zero2", 1)])
def test_ppo_sends_gradients_in_its_own_buckets(tmp_path, machine, engines):
    """DeepSpeed's 2 GB were planned, where PPO's engines ask for 2^26 numbers: 2159 MB were planned of a stage that takes 704."""
    work, layout, _ = planned(ppo_file(tmp_path), "ppo", machine, "2xcpu")
    assert estimate(work.job, work.cfg, layout).most("communication buffers") == engines * 2**26 * 4


def test_a_plan_for_gpus_is_not_measured_without_them(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    work, layout, _ = planned(sft_file(tmp_path), "sft", "gpu", "1x80GB")
    with pytest.raises(UserError, match="which has no GPU"):
        corrected(plan_stage(work, layout, knobs=False))
