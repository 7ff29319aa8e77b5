"""Batches that processes cannot share are refused before anything starts, with a change that mends them; --machine reaches every section."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from configs.errors import UserError
from configs.load import dump, load
from launch.batches import check_batches
from launch.cli import main

SFT = {"name": "one", "init_from": "MODEL", "data": "rows.jsonl", "train": {"batch_size": 32, "micro_batch_size": 32}}
CHAIN = {"name": "c", "base": "MODEL", "sft": {"data": "rows.jsonl"}, "reward": {"data": "pairs.jsonl"}}


def stage(**train) -> SimpleNamespace:
    return SimpleNamespace(train=SimpleNamespace(**train))


@pytest.mark.parametrize(
    ("batch", "micro", "processes", "change"),
    [
        (32, 32, 2, "micro_batch_size=16"),
        (48, 8, 4, "micro_batch_size=6"),  # 12 rows of each process: the largest divisor of 12 up to 8
        (32, 32, 24, "batch_size=768"),  # 24 processes share no 32 rows, whatever the micro-batch
    ],
)
def test_what_is_advised_mends_the_batch_and_keeps_it_where_it_can(batch, micro, processes, change):
    with pytest.raises(UserError, match=rf"such as sft\.train\.{change}$"):
        check_batches({"sft": stage(batch_size=batch, micro_batch_size=micro)}, processes)
    key, value = change.split("=")
    check_batches({"sft": stage(**({"batch_size": batch, "micro_batch_size": micro} | {key: int(value)}))}, processes)


def test_a_rollout_is_advised_a_size_that_minibatches_and_processes_divide():
    with pytest.raises(UserError, match=r"^train\.rollout_batch_size 64 is not a multiple of 6 = .* such as train\.rollout_batch_size=66$"):
        check_batches({"ppo": stage(rollout_batch_size=64, num_minibatches=2)}, 3, prefixed=False)


def test_a_stage_refuses_such_a_batch_in_a_dry_run(tmp_path: Path, capsys):
    """Processes started and data were read before a stage said so."""
    file = tmp_path / "sft.yaml"
    file.write_text(yaml.safe_dump(SFT | {"output": str(tmp_path / "out")}))
    assert main(["sft", "--config", str(file), "--machine", "cpu_ddp", "--dry-run"]) == 2
    assert "train.batch_size 32 is not a multiple of 64 = 2 process(es)" in capsys.readouterr().err
    assert main(["sft", "--config", str(file), "--machine", "cpu_ddp", "--dry-run", "train.micro_batch_size=16"]) == 0


def test_the_machine_of_the_command_line_reaches_the_sections_of_a_resolved_chain(tmp_path: Path, capsys):
    """OUTPUT/chain.yaml has machine: auto in every section, which hid --machine without a word."""
    from launch.chain.asked import machine_overrides

    written, resolved = tmp_path / "chain.yaml", tmp_path / "resolved.yaml"
    written.write_text(yaml.safe_dump(CHAIN | {"output": str(tmp_path / "out")}))
    resolved.write_text(dump(load(written, "chain")))
    for file in (written, resolved):
        chain = load(file, "chain", machine_overrides(file, [], "cpu_zero2", 4))
        assert [(part.machine, part.processes) for part in (chain, chain.sft, chain.reward)] == [("cpu_zero2", 4)] * 3
        assert chain.dpo is None
        assert main(["launch", "show", str(file), "--machine", "cpu_zero2"]) == 0
        out = capsys.readouterr().out
        assert out.count("--config_file configs/accelerate/cpu_zero2.yaml") == 2
        assert out.endswith("\n\nall machine files: align launch show\n")  # and none of their descriptions
        assert "zero3_offload" not in out


def test_a_chain_refuses_such_batches_in_a_dry_run(tmp_path: Path, capsys):
    """All of them at once, and before the first stage has run for hours."""
    from tests.tiny import tiny_data, tiny_model

    tiny_model(tmp_path / "base")
    tiny_data(tmp_path, "mnop")
    sections = {"sft": {"data": str(tmp_path / "demos.jsonl"), "train": {"batch_size": 32, "micro_batch_size": 32}}, "dpo": {"data": str(tmp_path / "pairs.jsonl"), "train": {"batch_size": 24, "micro_batch_size": 24}}}
    file = tmp_path / "chain.yaml"
    file.write_text(yaml.safe_dump({"name": "c", "base": str(tmp_path / "base"), "template": "plain", "output": str(tmp_path / "out")} | sections))
    assert main(["run", str(file), "--machine", "cpu_ddp", "--dry-run"]) == 2
    told = capsys.readouterr().err
    assert "sft.train.batch_size 32 is not a multiple of 64 = 2 process(es)" in told
    assert "dpo.train.batch_size 24 is not a multiple of 48 = 2 process(es)" in told
    assert main(["run", str(file), "--dry-run"]) == 0


def test_what_the_command_line_says_of_a_resolved_chain_reaches_its_sections(tmp_path: Path):
    """OUTPUT/chain.yaml has every shared key in every section, which hid the chain's own; what a section has of its own stays."""
    written, resolved = tmp_path / "chain.yaml", tmp_path / "resolved.yaml"
    own = CHAIN["reward"] | {"seed": 5, "output": "elsewhere"}
    written.write_text(yaml.safe_dump(CHAIN | {"output": "out", "reward": own, "max_length": 256}))
    resolved.write_text(dump(load(written, "chain")))
    overrides = ["seed=3", "output=other", "max_length=128", "attn_implementation=eager", "split={validation: 0.2}"]
    for file in (written, resolved):
        chain = load(file, "chain", overrides)
        assert (chain.sft.seed, chain.reward.seed) == (3, 5)
        assert [str(part.output) for part in (chain, chain.sft, chain.reward)] == ["other", "other/sft", "elsewhere"]
        assert {str(part.registry) for part in (chain, chain.sft, chain.reward)} == {"other/registry"}
        assert [(part.max_length, part.attn_implementation, part.split.validation) for part in (chain, chain.sft, chain.reward)] == [(128, "eager", 0.2)] * 3
        assert str(load(file, "chain", ["registry=shared"]).reward.registry) == "shared"
    assert load(resolved, "chain") == load(written, "chain")
