"""What the machine files may say, what `align launch show` tells of them, and the command that is composed from them."""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from configs import machines
from configs.errors import UserError
from configs.machines import FOLDER, NODES, for_nodes, machine_file, machine_names, purpose
from launch import command, machine_choice
from launch.cli import main
from launch.machine_choice import GIB, Size, parameters
from launch.nodes import Nodes, nodes_of, per_node

ROOT = Path(__file__).parents[2]
SINGLE = {"cpu", "gpu"}
WANTED = {
    "cpu", "cpu_ddp", "cpu_zero1", "cpu_zero2", "cpu_zero3", "gpu", "gpu_ddp", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload", "fsdp2",
}  # fmt: skip
BANNED = ("batch", "accumulation", "clipping", "learning_rate", "optimizer", "scheduler", "precision_", "checkpointing", "hidden", "seed")


def settings(name: str) -> dict:
    return yaml.safe_load((FOLDER / f"{name}.yaml").read_text())


def test_every_kind_of_machine_has_a_file_for_one_node_and_for_many():
    assert set(machine_names()) == WANTED | {name + NODES for name in WANTED - SINGLE}
    assert set(for_nodes()) == {name + NODES for name in WANTED - SINGLE}


@pytest.mark.parametrize("name", machine_names())
def test_a_machine_file_describes_a_machine_only(name):
    """Accelerate's environment value for accumulation overrides the number a stage gives, silently; precision likewise."""
    found = settings(name)
    assert found["mixed_precision"] == "no"
    for key in [*found, *found.get("deepspeed_config", {}), *found.get("fsdp_config", {})]:
        assert key == "offload_optimizer_device" or not any(word in key for word in BANNED), key


@pytest.mark.parametrize("name", machine_names())
def test_accelerate_accepts_a_machine_file(name):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(machine_file(name)))
    one = 1 if name in SINGLE else 2 if name.startswith("cpu") else 8
    assert config.num_machines == (2 if name.endswith(NODES) else 1)
    assert config.num_processes == one * config.num_machines
    assert config.use_cpu is name.startswith("cpu")
    stage = {"zero1": 1, "zero2": 2, "zero3": 3}.get(name.removeprefix("cpu_")[:5])
    assert config.deepspeed_config.get("zero_stage") == stage
    assert config.fsdp_config.get("fsdp_version") == (2 if "fsdp2" in name else None)
    if stage:  # the default, pdsh, would log in to the other nodes itself
        assert config.deepspeed_config["deepspeed_multinode_launcher"] == "standard"


@pytest.mark.parametrize("name", for_nodes())
def test_a_file_for_many_nodes_is_the_one_for_one_node_with_more_of_them(name):
    one, many = settings(name.removesuffix(NODES)), settings(name)
    assert {key for key in many if one.get(key) != many[key]} == {"num_machines", "num_processes", "main_process_ip", "main_process_port"}
    assert one.keys() <= many.keys()


@pytest.mark.parametrize("name", machine_names())
def test_a_machine_file_says_what_it_is_for(name):
    what, when = purpose(FOLDER / f"{name}.yaml")
    assert what.endswith(".")
    assert len(when.rstrip(".").split()) >= 3


def test_what_offload_and_stages_mean():
    offload = {name: (settings(name)["deepspeed_config"]["offload_optimizer_device"], settings(name)["deepspeed_config"]["offload_param_device"]) for name in ("zero3", "zero2_offload", "zero3_offload")}
    assert offload == {"zero3": ("none", "none"), "zero2_offload": ("cpu", "none"), "zero3_offload": ("cpu", "cpu")}


# Composing ---------------------------------------------------------------------------------------------------------


def asked(**given) -> SimpleNamespace:
    values = {"nodes": None, "node_rank": None, "main_address": None, "main_port": None, "rendezvous_timeout": 300}
    return SimpleNamespace(**values | given)


def test_nodes_from_the_command_line():
    assert nodes_of(asked(), {"num_machines": 1}, ships=True) == Nodes()
    found = nodes_of(asked(nodes=4, node_rank=3, main_address="n0", main_port=1234, rendezvous_timeout=9), {"num_machines": 2}, ships=True)
    assert found == Nodes(4, 3, "n0", 1234, 9)
    assert found.options() == [
        "--num_machines", "4", "--machine_rank", "3", "--main_process_ip", "n0", "--main_process_port", "1234", "--rdzv_conf", "timeout=9",
    ]  # fmt: skip


def test_a_machine_file_of_ones_own_says_rank_and_address_and_ours_do_not():
    own = {"num_machines": 2, "machine_rank": 1, "main_process_ip": "10.0.0.1", "main_process_port": 5000}
    assert nodes_of(asked(), own, ships=False) == Nodes(2, 1, "10.0.0.1", 5000)
    with pytest.raises(UserError, match="--node-rank is missing: 2 nodes"):
        nodes_of(asked(), own, ships=True)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"nodes": 0}, "--nodes: found 0"),
        ({"node_rank": 1}, "--node-rank: only for several nodes"),
        ({"main_address": "x", "main_port": 1}, "--main-address, --main-port: only for several nodes"),
        ({"nodes": 2}, "--node-rank is missing"),
        ({"nodes": 2, "node_rank": 2, "main_address": "x"}, "--node-rank: found 2; expected 0 to 1"),
        ({"nodes": 2, "node_rank": 0}, "--main-address is missing"),
        ({"nodes": 2, "node_rank": 0, "main_address": "x", "main_port": 0}, "--main-port: found 0"),
        ({"nodes": 2, "node_rank": 0, "main_address": "x", "rendezvous_timeout": 0}, "--rendezvous-timeout: found 0"),
    ],
)
def test_what_cannot_be_is_refused(given, says):
    with pytest.raises(UserError, match=says):
        nodes_of(asked(**given), {"num_machines": 1}, ships=True)


def test_processes_are_shared_equally_or_refused():
    assert per_node(8, 4) == 2
    for processes, advice in ((8, "give 6 or 9"), (2, "give 3 or 3")):
        with pytest.raises(UserError, match=advice):
            per_node(processes, 3)


CONFIG = "name: x\ninit_from: m\ndata: d\nregistry: {0}/registry\noutput: {0}/out\n"


def write_config(folder: Path) -> str:
    (folder / "sft.yaml").write_text(CONFIG.format(folder))
    return str(folder / "sft.yaml")


def test_a_stage_over_nodes_is_printed_as_one_accelerate_command(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = ["--machine", "zero3", "--processes", "8", "--nodes", "4", "--node-rank", "2", "--main-address", "n0", "--print-command", "train.micro_batch_size=4"]
    assert main(["sft", "--config", write_config(tmp_path), *words]) == 0
    assert capsys.readouterr().out == (
        "accelerate launch --config_file configs/accelerate/zero3_nodes.yaml --num_processes 8 --num_machines 4 --machine_rank 2 "
        f"--main_process_ip n0 --main_process_port 29500 --rdzv_conf timeout=300 -m stages.sft --config {tmp_path}/out/plan.yaml\n"
    )


def test_a_chain_takes_machine_processes_and_nodes(tmp_path, capsys):
    file = tmp_path / "chain.yaml"
    (tmp_path / "d.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    file.write_text(f"name: x\nbase: m\noutput: {tmp_path}/out\nsft: {{data: {tmp_path}/d.jsonl}}\n")
    assert main(["run", str(file), "--machine", "cpu_zero2", "--processes", "4", "--dry-run"]) == 0
    assert "cpu_zero2.yaml --num_processes 4 " in capsys.readouterr().out
    assert main(["run", str(file), "--nodes", "2", "--node-rank", "1", "--main-address", "n0", "--dry-run"]) == 0
    assert "cpu_ddp_nodes.yaml --num_processes 4 --num_machines 2 --machine_rank 1 --main_process_ip n0" in capsys.readouterr().out
    assert main(["run", str(file), "--nodes", "2"]) == 2
    assert "--node-rank is missing" in capsys.readouterr().err


def test_processes_default_to_the_gpus_of_every_node(monkeypatch):
    machine = command.load_machine("zero3", None, 3)
    for gpus, total in ((0, 24), (4, 12)):
        monkeypatch.setattr(machines, "count_gpus", lambda gpus=gpus: gpus)
        assert command.stage_command("stages.sft", Path("c"), machine, None, Nodes(3, 0, "n0")).processes == total
    assert command.stage_command("stages.sft", Path("c"), command.load_machine("cpu_ddp", None, 3), None, Nodes(3, 0, "n0")).processes == 6


def test_a_file_for_nodes_is_not_started_as_one_node():
    with pytest.raises(UserError, match="is for 2 nodes; give --nodes"):
        command.stage_command("stages.sft", Path("c"), command.load_machine("cpu_ddp_nodes", None))


def test_a_deepspeed_file_of_ones_own_is_not_started_over_ssh():
    """Without the setting, accelerate would have DeepSpeed log in to every node, once from each."""
    own = command.Machine(Path("m.yaml"), {"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 3}, "num_processes": 8})
    assert "--deepspeed_multinode_launcher standard" in command.stage_command("stages.sft", Path("c"), own, None, Nodes(2, 0, "n0")).typed
    assert "launcher" not in command.stage_command("stages.sft", Path("c"), own).typed
    ours = command.load_machine("cpu_zero3", None, 2)
    assert "launcher" not in command.stage_command("stages.sft", Path("c"), ours, None, Nodes(2, 0, "n0")).typed


def test_what_has_not_enough_gpus_is_refused_before_anything_starts(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(machines, "count_gpus", lambda: 2)
    assert command.check_startable(command.load_machine("zero3", None), 2) is None
    assert command.check_startable(command.load_machine("cpu_ddp", None), 4) is None
    assert main(["sft", "--config", write_config(tmp_path), "--machine", "zero3", "--processes", "4"]) == 2
    assert "zero3.yaml is for GPUs, and this node has 2 for 4 process(es)" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(machines, "count_gpus", lambda: 0)  # it warned, and started eight processes on the CPU
    monkeypatch.setattr(machines, "other_accelerators", lambda: False)
    assert main(["sft", "--config", write_config(tmp_path), "--machine", "zero3", "--processes", "4"]) == 2
    assert "zero3.yaml is for GPUs, and none is found here" in capsys.readouterr().err
    monkeypatch.setattr(machines, "other_accelerators", lambda: True)  # an AMD machine: what it has is not counted
    assert command.check_startable(command.load_machine("zero3", None), 8) is None


def test_fsdp_is_refused_before_anything_starts_and_show_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(machines, "count_gpus", lambda: 8)
    assert main(["sft", "--config", write_config(tmp_path), "--machine", "fsdp2", "--processes", "4"]) == 2
    assert "fsdp2.yaml: the stages refuse FSDP" in capsys.readouterr().err
    (row,) = shown(capsys, "sft", "--machine", "fsdp2")["chosen"]
    assert any(line.startswith("can NOT start here: ") and "the stages refuse FSDP" in line for line in row["why"])
    assert "refused by the stages" in purpose(FOLDER / "fsdp2.yaml")[1]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"deepspeed_config": {"zero_stage": 2, "offload_optimiser_device": "cpu"}}, "deepspeed_config.offload_optimiser_device: .*Did you mean 'offload_optimizer_device'"),
        ({"deepspeed_config": {"zero_stage": 2, "reduce_bucket_size": 5}}, "deepspeed_config.reduce_bucket_size: .*a JSON file that deepspeed_config_file names"),
        ({"num_proceses": 2}, "num_proceses: .*Did you mean 'num_processes'"),
        ({"deepspeed_config": "zero2.json"}, "deepspeed_config: found 'zero2.json'; expected keys such as zero_stage"),
    ],
)
def test_a_key_that_accelerate_does_not_know_is_refused_in_a_dry_run(tmp_path, capsys, change, says):
    """Accelerate does without a deepspeed_config key that it does not know, without a word."""
    file = tmp_path / "own.yaml"
    file.write_text(yaml.safe_dump(settings("cpu_zero2") | change))
    assert main(["sft", "--config", write_config(tmp_path), "--machine", str(file), "--dry-run"]) == 2
    assert re.search(rf"own\.yaml: {says}", capsys.readouterr().err)


def test_the_keys_are_those_of_accelerate():
    from accelerate.commands.config.config_args import ClusterConfig
    from accelerate.commands.launch import launch_command_parser

    assert set(ClusterConfig.__dataclass_fields__) <= set(machines.KEYS)
    (group,) = (group for group in launch_command_parser()._action_groups if group.title == "DeepSpeed Arguments")
    assert {action.dest for action in group._group_actions} == set(machines.DEEPSPEED_KEYS)


@pytest.mark.parametrize("name", ["cpu", "cpu_ddp", "cpu_zero2"])
def test_a_machine_file_of_the_cpu_hides_the_gpus_there_are(name, monkeypatch):
    """Stages took the GPUs wherever torch saw one: `accelerate launch` passes use_cpu on to a single process only."""
    from accelerate.commands import launch

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    words = ["--config_file", str(machine_file(name)), "--main_process_port", "0", "-m", "stages.sft"]
    args, _, _ = launch._validate_launch_command(launch.launch_command_parser().parse_args(words))
    args.deepspeed_fields_from_accelerate_config = ""
    if name == "cpu_zero2":
        _, env = launch.prepare_deepspeed_cmd_env(args)
    else:
        env = launch.prepare_simple_launcher_cmd_env(args)[1] if name == "cpu" else launch.prepare_multi_gpu_env(args)
    assert env["CUDA_VISIBLE_DEVICES"] == "-1,-1"


def test_a_cpu_machine_file_of_ones_own_hides_the_gpus_too(monkeypatch):
    from stages.devices import hide_gpus_if_asked

    own = command.Machine(Path("m.yaml"), {"distributed_type": "MULTI_GPU", "use_cpu": True, "num_processes": 2})
    asked_for = command.stage_command("stages.sft", Path("c"), own).extra_env["ACCELERATE_USE_CPU"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "False")
    hide_gpus_if_asked()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"
    monkeypatch.setenv("ACCELERATE_USE_CPU", asked_for)
    hide_gpus_if_asked()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "-1"


def test_deepspeed_says_nothing_of_a_machine_without_gpus():
    code = "import stages, deepspeed; print('done')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"CUDA_VISIBLE_DEVICES": "-1"}, capture_output=True, text=True, check=True)
    assert "Setting accelerator" not in done.stdout + done.stderr
    assert done.stdout.endswith("done\n")


def test_threads_are_those_of_one_node(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(command.os, "sched_getaffinity", lambda _pid: set(range(8)), raising=False)
    machine = command.load_machine("cpu_ddp", None, 4)
    assert command.stage_command("stages.sft", Path("c"), machine, 8, Nodes(4, 0, "n0")).extra_env["OMP_NUM_THREADS"] == "4"


# align launch show -------------------------------------------------------------------------------------------------


def shown(capsys, *words: str) -> dict:
    assert main(["launch", "show", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_show_lists_every_machine_file_and_the_choice_for_a_stage(capsys, monkeypatch):
    monkeypatch.setattr(machines, "count_gpus", lambda: 8)
    monkeypatch.setattr(machine_choice, "count_gpus", lambda: 8)
    monkeypatch.setattr(machine_choice, "gpu_memory", lambda: None)
    told = shown(capsys, "ppo")
    assert [row["name"] for row in told["machines"]] == machine_names()
    (row,) = told["chosen"]
    assert (row["machine"], row["processes"], row["nodes"]) == ("gpu_ddp", 8, 1)
    assert "GPUs found here: 8" in row["why"]
    assert any("unknown (MODEL" in line for line in row["why"])
    (row,) = shown(capsys, "sft", "--nodes", "4", "--machine", "zero3")["chosen"]
    assert (row["machine"], row["processes"], row["nodes"]) == ("zero3_nodes", 32, 4)
    assert "MAIN_ADDRESS" in row["command"]


def test_show_tells_of_every_stage_of_a_chain_and_writes_nothing(tmp_path, capsys):
    file = tmp_path / "chain.yaml"
    file.write_text(f"name: x\nbase: m\noutput: {tmp_path}/out\nsft: {{data: d}}\nreward: {{data: d, ensemble: {{members: 2}}}}\ndpo: {{data: d, machine: cpu_zero2}}\n")
    told = shown(capsys, str(file))
    assert [(row["stage"], row["machine"], row["processes"]) for row in told["chosen"]] == [
        ("sft", "cpu", 1), ("reward", "cpu", 1), ("reward-2", "cpu", 1), ("dpo", "cpu_zero2", 2),
    ]  # fmt: skip
    assert "-m stages.reward --config" in told["chosen"][2]["command"]
    assert "the config says machine: cpu_zero2" in told["chosen"][3]["why"]
    assert told["chosen"][0]["why"][0].startswith("neither the config nor the command line names a machine file")
    told = shown(capsys, str(file), "--processes", "2", "dpo.machine=cpu_ddp")["chosen"]
    assert told[0]["why"][0] == "the command line says processes: 2; no machine file is named: auto takes the one for so many processes"
    assert told[3]["why"][0] == "the command line says machine: cpu_ddp, processes: 2"
    assert not (tmp_path / "out").exists()


def test_show_for_a_person(capsys):
    assert main(["launch", "show"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {name} " in out for name in machine_names())
    assert "accelerate launch --config_file" in out


def test_show_refuses_what_it_cannot_read(tmp_path, capsys):
    for words, says in ((["sft", "a=1"], "needs the config file"), (["a=1"], "expected a config file or a stage"), ([str(tmp_path / "no.yaml")], "no.yaml")):
        assert main(["launch", "show", *words]) == 2
        assert says in capsys.readouterr().err


def test_parameters_are_counted_in_the_headers_alone(tmp_path):
    header = json.dumps({"__metadata__": {"format": "pt"}, "a": {"dtype": "F32", "shape": [3, 4], "data_offsets": [0, 48]}, "b": {"dtype": "BF16", "shape": [5], "data_offsets": [48, 58]}})
    for number in (1, 2):
        (tmp_path / f"{number}.safetensors").write_bytes(struct.pack("<Q", len(header)) + header.encode())  # no tensor follows
    assert parameters(tmp_path) == 2 * (12 + 5)
    (tmp_path / "3.safetensors").write_bytes(b"\0")
    assert parameters(tmp_path) is None


def test_bytes_on_each_gpu():
    """8 billion parameters on 8 GPUs: 16 bytes each unsharded; ZeRO-1 splits 8 of them, ZeRO-2 12, ZeRO-3 all, and what is frozen too."""
    size = Size(trained=8_000_000_000, frozen=1_000_000_000, frozen_bytes=2.0, says="")
    expected = {"gpu_ddp": 128 + 2, "zero1": 8 * (8 + 1) + 2, "zero2": 8 * (4 + 1.5) + 2, "zero3": 16 + 0.25}
    assert {name: size.state(name, 8) / 1e9 for name in expected} == pytest.approx(expected)


@pytest.mark.parametrize(("memory", "says"), [(80, "does NOT fit into 80% of a GPU: take --machine zero2"), (200, "that fits into 80% of a GPU"), (10, "take --machine zero3_offload")])
def test_a_model_too_large_for_the_machine_is_told_with_what_to_take(monkeypatch, memory, says):
    monkeypatch.setattr(machine_choice, "count_gpus", lambda: 8)
    monkeypatch.setattr(machine_choice, "gpu_memory", lambda: memory * GIB)
    monkeypatch.setattr(machine_choice, "size_of", lambda *_: Size(8_000_000_000, 0, 2.0, "it"))
    cfg = SimpleNamespace(machine="auto", processes=None, init_from="m")
    lines = machine_choice.reasons("sft", cfg, command.load_machine("gpu_ddp", 8), 8, 1)
    assert any(says in line for line in lines), lines


@pytest.mark.parametrize("name", ["cpu_zero1", "cpu_zero2", "cpu_zero3"])
def test_deepspeed_on_the_cpu_is_not_told_of_the_cpu(name):
    """Accelerate takes ACCELERATE_USE_CPU for a reason to leave DeepSpeed out: ZeRO-1 and 2 would run as plain DDP, and ZeRO-3 fail in its first forward pass."""
    assert "ACCELERATE_USE_CPU" not in command.stage_command("stages.sft", Path("c"), command.load_machine(name, 2), 2).extra_env
    assert command.stage_command("stages.sft", Path("c"), command.load_machine("cpu_ddp", 2), 2).extra_env["ACCELERATE_USE_CPU"] == "True"
