"""What the plan suggests, and what `--fit` writes, is what the stages run."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from configs.load import load
from configs.splitting import refused
from launch.cli import main
from launch.plan import fit
from launch.plan.estimate import simulated
from launch.plan.gpus import GIB, parse_gpus
from launch.plan.jobs import work_of
from launch.plan.make import knobs_of, layout_for, plan
from launch.plan.sources import Sources
from tests.unit.test_plan import chain


def planned_json(capsys, *words) -> dict:
    assert main(["plan", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


STAGES = {
    "sft": {"data": "d.jsonl", "init_from": "x"}, "dpo": {"data": "d.jsonl", "init_from": "x"},
    "ppo": {"prompts": "p.jsonl", "init_from": "x", "scorers": [{"kind": "length", "target": 5}]},
}  # fmt: skip


def stage(kind, tmp_path, **settings):
    file = tmp_path / f"{kind}.yaml"
    file.write_text(json.dumps({"name": "one", **STAGES[kind], **settings}))
    return load(file, kind)


@pytest.mark.parametrize(
    ("kind", "settings", "offload", "refused_at"),
    [
        ("sft", {}, "cpu", []),
        ("sft", {"lora": {"dora": True}}, "none", [3]),
        ("sft", {"lora": {"init": "pissa"}}, "none", [3]),
        ("sft", {"tune": {"method": "prompt_tuning"}}, "none", [3]),
        ("sft", {"tune": {"method": "full", "freeze": {"first": 1, "unfreeze_every": 5}}}, "none", [1, 2, 3]),
        ("dpo", {"lora": {"rank": 4}}, "cpu", []),
        ("ppo", {}, "cpu", []),
        ("ppo", {"lora": {"rank": 4}}, "none", []),
        ("ppo", {"lora": {"rank": 4}}, "cpu", [1, 2, 3]),
        ("ppo", {"value_function": "head"}, "cpu", [1, 2, 3]),
        ("ppo", {"ema_decay": 0.9}, "none", [3]),
        ("ppo", {"towards_start": 0.2}, "none", [3]),
        ("ppo", {"offload_frozen": True}, "none", [3]),
    ],
)  # fmt: skip
def test_where_a_stage_refuses_to_be_split(tmp_path, kind, settings, offload, refused_at):
    cfg = stage(kind, tmp_path, **settings)
    assert [zero for zero in (0, 1, 2, 3) if refused(cfg, zero, offload_optimizer=offload if zero else "none")] == refused_at


def test_fit_writes_nothing_that_the_stage_refuses(tmp_path, capsys, monkeypatch):
    """DoRA is refused at ZeRO-3, and nothing else is tried here before ZeRO-2."""
    monkeypatch.setattr(fit, "GPU_ORDER", ("zero3", "zero2"))
    out = tmp_path / "fitted.yaml"
    planned_json(capsys, chain(tmp_path), "sft.lora={rank: 4, dora: true}", "--gpus", "2x24GB", "--only", "sft", "--fit", out)
    assert load(out, "chain").sft.machine == "zero2"


def test_fit_says_what_it_passed_over_and_why(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(fit, "GPU_ORDER", ("gpu_ddp", "zero3_offload"))
    assert main(["plan", str(chain(tmp_path)), "--gpus", "2x0.3GB", "--only", "ppo", "--fit", str(tmp_path / "fitted.yaml")]) == 2
    error = capsys.readouterr().err
    assert "ppo does not fit" in error
    assert "zero3_offload: offload_optimizer_device cpu with one trunk" in error
    assert not (tmp_path / "fitted.yaml").exists()


def test_fit_says_where_the_node_is_too_small_and_not_the_gpus(tmp_path, capsys, monkeypatch):
    """It named the least that a GPU needs, for which there was room."""
    words = ["plan", str(chain(tmp_path)), "ppo.lora=null", "--gpus", "2x20GB", "--only", "ppo", "--fit", str(tmp_path / "fitted.yaml")]
    monkeypatch.setattr(fit, "GPU_ORDER", ("zero2_offload",))
    assert main([*words, "--node-memory", "0.0001GB"]) == 2
    error = capsys.readouterr().err
    assert "ppo does not fit on 2 x" in error
    assert "the least it needs" not in error
    assert "zero2_offload: a node would hold 0.0 GiB of what lies in main memory and has 0.0 (--node-memory)" in error
    assert main([*words, "--node-memory", "8GB"]) == 0


def test_fit_judges_the_node_at_the_micro_batch_that_it_chooses(tmp_path, capsys, monkeypatch):
    """Accumulation keeps a second copy of the gradients at ZeRO-2: a micro-batch of 1 takes more main memory than the one of 4 that is written."""
    monkeypatch.setattr(fit, "GPU_ORDER", ("zero2_offload",))
    words = ["plan", str(chain(tmp_path)), "--gpus", "2x20GB", "--only", "sft"]
    chosen = planned_json(capsys, *words[1:], "--fit", tmp_path / "free.yaml")["stages"][0]
    one = planned_json(capsys, *words[1:], "sft.machine=zero2_offload", "sft.processes=2", "sft.train.micro_batch_size=1")["stages"][0]
    needs, more = chosen["host_bytes"]["total"], one["host_bytes"]["total"]
    assert (chosen["micro_batch"], chosen["accumulation"]) == (4, 1)
    assert needs < more
    assert main([*words, "--node-memory", f"{(needs + more) // 2 / 1e9:.7f}GB", "--fit", str(tmp_path / "fitted.yaml")]) == 0


def test_fit_names_the_sampler_s_batch_where_rollouts_are_the_peak(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(fit, "GPU_ORDER", ("gpu_ddp",))
    words = ["plan", str(chain(tmp_path)), "ppo.sampling.generate_batch_size=256", "ppo.train.rollout_batch_size=256", "--gpus", "2x0.65GB", "--only", "ppo"]
    assert main([*words, "--fit", str(tmp_path / "fitted.yaml")]) == 2
    error = capsys.readouterr().err
    assert "reached in rollout" in error
    assert "a smaller sampling.generate_batch_size" in error


@pytest.mark.parametrize(("gpus", "machine"), [("4xcpu", "cpu_ddp"), ("4x24GB", "gpu_ddp")])
def test_fit_writes_for_how_many_processes(tmp_path, capsys, gpus, machine):
    out = tmp_path / "fitted.yaml"
    found = planned_json(capsys, chain(tmp_path), "sft.processes=2", "--gpus", gpus, "--only", "sft", "--fit", out)
    written = load(out, "chain")
    assert (written.sft.machine, written.sft.processes) == (machine, 4)
    assert found["stages"][0]["processes"] == 4
    assert found["stages"][0]["fits"] is True  # of a CPU too the memory is known


def test_no_knob_is_one_that_the_stage_refuses(tmp_path):
    """PPO with adapters was told of machine=zero3_offload, which it refuses; without them that is a way."""
    gpus, device = parse_gpus("2x24GB")

    def knobs(*overrides):
        config = load(tmp_path / "chain.yaml", "chain", list(overrides))
        plans, _ = plan(config, "chain", gpus=gpus, device=device, nodes=1, machine="zero3", only="ppo", knobs=False)
        return {name for name, _ in knobs_of(plans[0])}

    chain(tmp_path)
    assert "machine=zero3_offload" not in knobs()
    assert "machine=zero3_offload" in knobs("ppo.lora=null")


def test_demonstrations_beside_ppo_are_planned(tmp_path):
    """Rows of 300 tokens beside completions of 16 decide the peak; measured once on a real stage: 302.7 MiB, planned 307.2, and 160.6 without."""
    place = layout_for(load(chain(tmp_path), "chain").ppo, None, *parse_gpus("1xCPU"), 1)
    (tmp_path / "demonstrations.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    config = load(tmp_path / "chain.yaml", "chain", [f"ppo.ptx={{data: {tmp_path / 'demonstrations.jsonl'}, coef: 1.0, ratio: 0.5}}"])
    job = work_of("ppo", config.ppo, place, Sources(base=config.base), config).job
    assert (job.demonstrations, job.demonstration_tokens) == (4, 64)  # half of 8 completions; without a tokenizer as long as allowed
    longer = replace(job, demonstration_tokens=300, demonstration_counted=299)
    without, with_them = (simulated(each, config.ppo, place) for each in (replace(job, demonstrations=0), longer))
    assert "update: demonstrations" not in without
    assert with_them["update: demonstrations"].total > max(peak.total for peak in without.values())
    assert with_them["update: demonstrations"].parts["activations"] > 2 * without["update policy"].parts["activations"]


def test_a_cpu_has_the_memory_of_its_machine(tmp_path, capsys):
    stages = planned_json(capsys, chain(tmp_path), "--gpus", "2xcpu", "--only", "sft")["stages"]
    assert stages[0]["fits"] is True
    assert stages[0]["device"]["memory_bytes"] > 0.1 * GIB
    assert main(["plan", str(tmp_path / "chain.yaml"), "--gpus", "100000xcpu", "--only", "sft", "sft.train.batch_size=200000", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["stages"][0]["fits"] is False


def test_without_gpus_a_cpu_for_each_process_is_planned(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("launch.machine_choice.gpu_memory", lambda: 0)
    found = planned_json(capsys, chain(tmp_path), "processes=2", "--only", "sft")
    assert found["stages"][0]["processes"] == 2


def test_the_kind_can_be_named(tmp_path, capsys):
    """A config whose keys tell nothing ended in "name the kind with --kind", which was no option."""
    base = chain(tmp_path).parent / "base"
    file = tmp_path / "s8.yaml"
    file.write_text(json.dumps({"name": "s8", "registry": str(tmp_path / "r"), "init_from": str(base), "max_length": 64, "data": "none.jsonl", "train": {"batch_size": 8, "micro_batch_size": 1}}))
    assert main(["plan", str(file), "--gpus", "1x24GB"]) == 2
    capsys.readouterr()
    assert planned_json(capsys, file, "--kind", "sft", "--gpus", "1x24GB")["stages"][0]["stage"] == "sft"
