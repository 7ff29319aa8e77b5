"""The plan's hours: what it hands to the time model, and what it says of how far to trust them."""

from __future__ import annotations

import json

import pytest

from configs.load import load
from launch.plan.gpus import parse_gpus
from launch.plan.make import layout_for, works
from launch.plan.sources import Sources
from launch.plan.timing import facts_of, hardware_of
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
