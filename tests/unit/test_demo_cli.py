"""`align demo`: its options are overrides of the shipped chain, and every shipped chain is valid."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from configs.load import load
from launch import demo_cli

CHAINS = Path(__file__).parents[2] / "configs" / "chains"


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    demo_cli.add_parser(parser.add_subparsers())
    return parser.parse_args(["demo", *words])


def test_options_become_overrides_and_the_users_come_last() -> None:
    assert demo_cli.overrides_of(parse()) == []
    overrides = demo_cli.overrides_of(parse("--smoke", "--seed", "3", "--output", "here", "seed=4"))
    assert overrides[: len(demo_cli.SMOKE)] == demo_cli.SMOKE
    assert overrides[len(demo_cli.SMOKE) :] == ["seed=3", "output=here", "seed=4"]


def test_smoke_is_smaller_in_every_key_it_sets() -> None:
    full, smoke = load(CHAINS / "demo.yaml", "chain"), load(CHAINS / "demo.yaml", "chain", demo_cli.SMOKE)
    assert smoke.sft.train.epochs < full.sft.train.epochs
    assert smoke.reward.train.epochs < full.reward.train.epochs
    assert smoke.ppo.train.iterations < full.ppo.train.iterations
    assert smoke.eval.max_prompts < full.eval.max_prompts


def test_seed_and_output_reach_every_step() -> None:
    chain = load(CHAINS / "demo.yaml", "chain", demo_cli.overrides_of(parse("--seed", "7", "--output", "here")))
    assert [chain.sft.seed, chain.reward.seed, chain.dpo.seed, chain.ppo.seed] == [7] * 4
    assert [step.arguments["seed"] for step in chain.prepare.values()] == [7] * len(chain.prepare)
    assert chain.base == "here/base"
    assert [step.arguments["output"] for step in chain.prepare.values()] == ["here/data", "here/base"]


def test_run_uses_the_code_of_align_run(monkeypatch) -> None:
    from launch.chain import runner

    seen = []
    monkeypatch.setattr(runner, "run_chain", lambda *args, **kwargs: seen.append((args, kwargs)) or 3)
    assert demo_cli.run(parse("--json", "seed=1")) == 3
    ((chain, overrides), kwargs) = seen[0]
    assert Path(chain).is_file()
    assert overrides == ["seed=1"]
    assert kwargs == {"as_json": True}


@pytest.mark.parametrize("name", ["stories", "stories_weak", "polite"])
def test_chains_that_need_assets_take_them_as_an_override(name: str) -> None:
    chain = load(CHAINS / f"{name}.yaml", "chain", ["assets=somewhere"])
    assert chain.base == "somewhere/models/stories260K_hf"
    assert all((chain.sft, chain.reward, chain.dpo or name == "stories_weak", chain.ppo, chain.eval))
