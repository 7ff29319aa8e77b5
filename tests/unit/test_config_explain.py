"""`align config …`, the JSON schema, the passthrough to TRL, machine files."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from configs.errors import UserError
from configs.explain import explain, json_schema
from configs.load import MODELS
from configs.machines import count_gpus, machine_file, pick_machine
from configs.problems import all_paths
from configs.trainer_args import CLASSES, OUR_FIELDS, check_trainer, trainer_fields
from launch.cli import main

ROOT = Path(__file__).parents[2]


# explain -----------------------------------------------------------------------------------------------------------


def test_a_key_is_explained_with_type_unit_default_range_and_meaning():
    assert explain("ppo.kl_coef").splitlines() == [
        "kl_coef",
        "  type     number",
        "  unit     per token, per nat",
        "  default  0.05",
        "  allowed  at least 0",
        "  meaning  Weight of the KL penalty per token, per nat; where an adaptive controller starts.",
        "  used by  ppo",
    ]


def test_a_key_that_means_two_things_is_explained_twice():
    blocks = explain("learning_rate").split("\n\n")
    assert [block.splitlines()[-1].split()[-1] for block in blocks] == ["dpo", "ppo"]
    assert "default  1e-05" in blocks[0]
    assert "default  3e-06" in blocks[1]


def test_one_key_of_several_stages_is_explained_once():
    assert explain("train.batch_size").count("used by  sft, reward, dpo") == 1
    assert "\n\n" not in explain("train.batch_size")
    assert "give `seed` once at the top" in explain("sft.seed")


def test_limits_are_found_inside_optional_fields():
    assert "allowed  at least 1" in explain("train.max_steps")
    assert "allowed  above 0, at most 1" in explain("gamma")
    assert "one of all, last" in explain("sft.loss_on")


def test_item_numbers_are_as_good_as_none():
    assert explain("data.0.weight") == explain("data.weight")


@pytest.mark.parametrize("kind", MODELS)
def test_every_key_can_be_explained_and_has_a_meaning(kind):
    listing = explain(kind)
    for path in all_paths(MODELS[kind]):
        text = explain(f"{kind}.{path}")
        if kind != "chain" or path.partition(".")[0] not in ("sft", "reward", "dpo", "ppo"):
            assert path in listing
        assert all(len(line.split(maxsplit=1)) == 2 for line in text.splitlines() if line.strip().startswith("meaning")), text


def test_what_only_a_chain_s_section_has_is_explained():
    assert explain("reward.ensemble.members") == explain("chain.reward.ensemble.members")
    assert "used by  chain" in explain("reward.ensemble")
    assert "reward.ensemble.members" in explain("chain")
    assert explain("chain.reward.seed") == explain("reward.seed")


def test_an_unknown_key_is_refused_with_the_near_ones():
    with pytest.raises(UserError, match=r"'kl_cof'\. Did you mean 'kl_coef'"):
        explain("kl_cof")
    with pytest.raises(UserError, match=r"Did you mean 'ppo\.sampling\.temperature'"):
        explain("ppo.sampling.temprature")
    with pytest.raises(UserError, match="align config explain KIND"):
        explain("zzzzzz")
    with pytest.raises(UserError):
        explain("")


# JSON schema -------------------------------------------------------------------------------------------------------


def test_the_schema_of_a_chain_does_not_ask_for_what_the_chain_fills_in():
    schema = json_schema("chain")
    assert schema["required"] == ["name", "base"]
    assert schema["$defs"]["SFTStage"]["required"] == ["data"]
    assert schema["$defs"]["PPOStage"]["required"] == ["prompts"]
    assert schema["$defs"]["ChainReward"]["required"] == ["data"]
    assert schema["additionalProperties"] is False
    assert "with" in schema["$defs"]["Prepare"]["properties"]


def test_the_schema_allows_a_bare_path_where_the_loader_does():
    data = json_schema("sft")["properties"]["data"]
    assert {"type": "string"} in data["anyOf"]


@pytest.mark.parametrize("kind", MODELS)
def test_the_schema_is_json(kind):
    assert json.loads(json.dumps(json_schema(kind)))["properties"]


# The verb ----------------------------------------------------------------------------------------------------------


def align(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "launch.cli", *words], capture_output=True, text=True, cwd=ROOT, check=False)


def test_check_and_show(tmp_path, capsys):
    file = tmp_path / "a.yaml"
    file.write_text("name: demo\nbase: ${assets}/m\nsft: {data: x}\n")
    assert main(["config", "check", str(file), "assets=here"]) == 0
    assert "a good chain config" in capsys.readouterr().out
    assert main(["config", "show", str(file), "assets=here", "sft.seed=5"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert (shown["base"], shown["sft"]["init_from"], shown["sft"]["seed"]) == ("here/m", "here/m", 5)


def test_check_prints_the_problems_and_exits_2(tmp_path):
    file = tmp_path / "sft.yaml"
    file.write_text("name: demo\ninit_from: m\ndata: x\nfoo: 1\n")
    done = align("config", "check", str(file))
    assert done.returncode == 2
    assert f"{file}:4: foo: unknown key" in done.stderr
    assert "Traceback" not in done.stderr
    told = align("config", "check", str(file), "--json")
    assert told.returncode == 2
    *problems, taken = [line for line in done.stderr.removeprefix("error: ").splitlines() if line]
    assert json.loads(told.stdout)["problems"] == problems
    assert taken == f"{file}: taken for a sft config; if it is another, name the kind with --kind, or in the file's name, such as my-sft.yaml"


def test_a_file_that_may_be_of_several_kinds_is_checked_all_the_same(tmp_path, capsys):
    """It was not looked at, and with --json nothing was printed."""
    file = tmp_path / "my.yaml"
    file.write_text("name: demo\ninit_from: m\ndata: x\n")
    assert main(["config", "check", str(file)]) == 0
    assert f"{file}: good as sft, reward, dpo; its keys fit each of them: name the kind with --kind" in capsys.readouterr().out
    file.write_text("name: demo\ninit_from: m\ndata: x\ntrain: {learning_rat: 1}\n")
    assert main(["config", "check", str(file), "--json"]) == 2
    told = json.loads(capsys.readouterr().out)
    assert (told["kind"], told["good"], len(told["problems"])) == ("sft", False, 1)
    assert main(["config", "check", str(file)]) == 2
    err = capsys.readouterr().err
    assert f"{file}:4: train.learning_rat: unknown key" in err
    assert f"{file}: taken for a sft config; if it is another" in err
    assert main(["config", "show", str(file)]) == 2
    assert "(sft, reward, dpo); name the kind with --kind, or in the file's name" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "name", "kind"),
    [
        ("base: x\n", "a.yaml", "chain"),
        ("sft: {}\n", "a.yaml", "chain"),
        ("checkpoints: {}\nprompts: x\n", "a.yaml", "eval"),
        ("prompts: x\n", "a.yaml", "ppo"),
        ("data: x\nbeta: 1\n", "a.yaml", "dpo"),
        ("data: x\nuse_margin: true\n", "a.yaml", "reward"),
        ("data: x\npacking: true\n", "a.yaml", "sft"),
        ("data: x\ntune: {method: full}\n", "a.yaml", "sft"),
        ("data: x\n", "my-reward.yaml", "reward"),
    ],
)
def test_the_kind_is_told_by_the_keys_or_the_name(tmp_path, text, name, kind):
    from launch.config_cli import guess_kind

    (tmp_path / name).write_text(text)
    assert guess_kind(str(tmp_path / name)) == kind


def test_a_kind_that_cannot_be_told_is_asked_for(tmp_path):
    from launch.config_cli import guess_kind

    (tmp_path / "a.yaml").write_text("data: x\n")
    with pytest.raises(UserError, match="--kind"):
        guess_kind(str(tmp_path / "a.yaml"))


def test_what_is_saved_for_a_stage_tells_its_kind(tmp_path):
    from configs.load import load_text, save
    from launch.config_cli import guess_kind

    for kind in ("sft", "reward", "dpo"):
        save(load_text("name: x\ninit_from: m\ndata: d\n", kind), tmp_path / "config.yaml")
        assert guess_kind(str(tmp_path / "config.yaml")) == kind


# trainer: ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CLASSES)
def test_the_arguments_read_from_source_are_those_of_the_class(kind):
    import trl

    cls = getattr(trl, CLASSES[kind])
    assert set(trainer_fields(kind)) == {field.name for field in dataclasses.fields(cls) if field.init}


def test_the_class_itself_is_asked_where_the_source_is_laid_out_otherwise(monkeypatch):
    import configs.trainer_args as module

    monkeypatch.setattr(module, "_class_fields", lambda *_: None)
    fields = module.trainer_fields.__wrapped__("dpo")
    monkeypatch.undo()
    assert set(fields) == set(module.trainer_fields("dpo"))


def test_trl_is_not_imported_to_check_its_arguments():
    code = "import sys; from configs.trainer_args import check_trainer as c; assert c('sft', {'optimm': 1}); assert not {'trl','torch','transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_arguments_pass_or_are_refused_with_what_to_do():
    assert check_trainer("sft", {"optim": "sgd", "eval_accumulation_steps": None, "logging_first_step": True, "adam_beta2": 0.98, "torch_empty_cache_steps": 5}) == []
    assert check_trainer("dpo", {}) == []
    assert check_trainer("dpo", {"beta": 0.1}) == ["beta: the stage sets this itself; set `beta` instead"]
    assert check_trainer("reward", {"adam_beta1": "x"}) == ["adam_beta1: found 'x'; expected a number"]
    assert check_trainer("sft", {"group_by_length": True})[0].startswith("group_by_length: SFTConfig has no such argument")
    assert check_trainer("sft", {"dataloader_num_workers": True}) == ["dataloader_num_workers: found True; expected a whole number"]


@pytest.mark.parametrize("kind", CLASSES)
def test_what_would_contradict_the_stage_is_refused(kind):
    """Each of these passed through and broke something: pad = EOS in the published tokenizer, a TypeError, or no effect at all."""
    values = {
        "eos_token": "</s>", "pad_token": "</s>", "chat_template_path": "x", "model_init_kwargs": {}, "dataset_text_field": "text",
        "eval_packing": True, "truncation_mode": "keep_end", "assistant_only_loss": True, "completion_only_loss": False, "shuffle_dataset": True,
        "eval_on_start": True, "save_total_limit": 1, "dataset_num_proc": 4,
    }  # fmt: skip
    allowed = [key for key, value in values.items() if key in trainer_fields(kind) and not check_trainer(kind, {key: value})]
    assert allowed == []


@pytest.mark.parametrize("kind", CLASSES)
def test_the_fields_that_errors_point_at_exist(kind):
    keys = set(all_paths(MODELS[kind]))
    for argument, ours in OUR_FIELDS[kind].items():
        if not ours.startswith("nothing: "):
            assert ours.split(" ")[0] in keys, f"{argument} points at {ours}"


# Machine files -----------------------------------------------------------------------------------------------------


def test_the_machine_that_fits():
    assert [pick_machine(0), pick_machine(0, 2), pick_machine(1), pick_machine(8), pick_machine(8, 1)] == ["cpu", "cpu_ddp", "gpu", "gpu_ddp", "gpu"]
    assert [pick_machine(0, None, 2), pick_machine(0, 4, 2), pick_machine(1, None, 2), pick_machine(8, 16, 2)] == ["cpu_ddp_nodes"] * 2 + ["gpu_ddp_nodes"] * 2


def test_machine_files_by_name_and_path(tmp_path):
    assert machine_file("cpu_ddp").name == "cpu_ddp.yaml"
    (tmp_path / "mine.yaml").write_text("num_processes: 1\n")
    assert machine_file(str(tmp_path / "mine.yaml")) == tmp_path / "mine.yaml"
    with pytest.raises(UserError, match=r"Did you mean 'gpu_ddp'"):
        machine_file("gpu_dpd")
    with pytest.raises(UserError, match="no such file"):
        machine_file("nowhere/x.yaml")


def test_hidden_gpus_are_not_counted(monkeypatch):
    monkeypatch.setattr(Path, "glob", lambda self, pattern: [Path("/dev/nvidia0"), Path("/dev/nvidia1"), Path("/dev/nvidiactl")])
    for visible, count in (("", 0), ("0", 1), ("1,0", 2), ("-1", 0), ("0,-1,1", 1)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert count_gpus() == count
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert count_gpus() == 2


def test_nothing_in_this_environment_overrides_a_stage():
    assert "ACCELERATE_GRADIENT_ACCUMULATION_STEPS" not in os.environ
