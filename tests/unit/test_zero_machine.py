"""What a machine file with DeepSpeed needs of the machine: tools to compile with, or to do without."""

from __future__ import annotations

import re

import pytest

from configs.errors import UserError
from configs.schema import Train
from stages.training import entry
from stages.zero import machine


@pytest.fixture
def zero3(monkeypatch):
    """The environment that `accelerate launch` makes of a ZeRO-3 machine file."""
    settings = {"USE_DEEPSPEED": "true", "DEEPSPEED_ZERO_STAGE": "3", "DEEPSPEED_ZERO3_INIT": "true", "DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none"}
    for name, value in settings.items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    monkeypatch.delenv("CXX", raising=False)


@pytest.fixture
def bare(monkeypatch, tmp_path):
    """A machine with neither a compiler nor ninja."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))


def test_the_zero_stage_is_the_machine_files(zero3, monkeypatch):
    assert machine.zero_stage() == 3
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "false")
    assert machine.zero_stage() == 0


def test_a_deepspeed_json_decides_the_stage(zero3, monkeypatch, tmp_path):
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 2}}')
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(tmp_path / "ds.json"))
    assert machine.zero_stage() == 2
    (tmp_path / "ds.json").write_text("{}")
    with pytest.raises(UserError, match=r"deepspeed_config is refused.*ZeRO"):
        machine.zero_stage()


def test_without_a_compiler_the_shared_memory_operator_is_left_out(zero3, bare, monkeypatch, capsys):
    import deepspeed.ops

    monkeypatch.setattr(deepspeed.ops, "__compatible_ops__", {machine.SHARED_MEMORY: True}, raising=False)
    machine.check_compiler()
    assert deepspeed.ops.__compatible_ops__ == {machine.SHARED_MEMORY: False}
    assert "there is no g++ and ninja" in capsys.readouterr().out


def test_offload_without_a_compiler_is_refused(zero3, bare, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "cpu")
    with pytest.raises(UserError, match=r"optimizer's state to cpu.*no g\+\+ and ninja on the PATH.*without offload"):
        machine.check_compiler()
    machine.check_compiler(own_optimizer=True)  # PPO's needs no compiler


def test_a_ninja_beside_python_is_found(bare, tmp_path):
    for tool in ("ninja", "g++"):
        (tmp_path / tool).write_text("#!/bin/sh\n")
        (tmp_path / tool).chmod(0o755)
    assert machine.missing_tools() == []


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ('"gradient_clipping": 0.3', "gradient_clipping: 0.3, the stage's config train.max_grad_norm: 1.0"),
        ('"gradient_accumulation_steps": 2', "gradient_accumulation_steps: 2, the stage's config train.batch_size / train.micro_batch_size: 4"),
        ('"train_micro_batch_size_per_gpu": 1', "train_micro_batch_size_per_gpu: 1, the stage's config train.micro_batch_size: 8"),
        ('"train_batch_size": 64', "train_batch_size: 64, the stage's config train.batch_size: 32"),
        ('"bf16": {"enabled": true}', "bf16.enabled: True, the stage's config train.precision: fp32"),
        ('"fp16": {"enabled": true}', "fp16.enabled: True, the stage's config train.precision: fp32"),
    ],
)
def test_what_the_stage_decides_and_a_deepspeed_json_says_otherwise_is_refused(zero3, monkeypatch, tmp_path, stated, message):
    (tmp_path / "ds.json").write_text(f'{{"zero_optimization": {{"stage": 2}}, {stated}}}')
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(tmp_path / "ds.json"))
    with pytest.raises(UserError, match=re.escape(message)):
        machine.check_settings(Train(precision="fp32"), bf16=False, processes=1)


def test_settings_that_agree_or_are_left_to_the_stage_are_fine(zero3, monkeypatch, tmp_path):
    stated = '"gradient_clipping": 1.0, "train_batch_size": "auto", "bf16": {"enabled": "auto"}, "gradient_accumulation_steps": "auto"'
    (tmp_path / "ds.json").write_text(f'{{"zero_optimization": {{"stage": 2}}, {stated}}}')
    machine.check_settings(Train(precision="fp32"), bf16=False, processes=1)
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(tmp_path / "ds.json"))
    machine.check_settings(Train(precision="fp32"), bf16=False, processes=1)


def test_fsdp_is_refused_rather_than_run_as_something_else(monkeypatch):
    from stages.zero.load import announce

    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match=r"distributed_type: FSDP.*machine: zero3"):
        announce(Train(precision="fp32"))


def test_accumulation_of_a_machine_file_is_refused(zero3, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")  # what accelerate launch gives where the file says nothing
    entry.refuse_foreign_accumulation()
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    with pytest.raises(UserError, match="sets gradient accumulation to 4; remove it"):
        entry.refuse_foreign_accumulation()


def test_deepspeed_without_zero_is_refused_before_training(zero3, monkeypatch):
    """Its engine has no gradient norm: the first step ended in a traceback."""
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "0")
    with pytest.raises(UserError, match=r"zero_stage 0, which splits nothing.*zero_stage 1, 2 or 3"):
        machine.check_settings(Train(precision="fp32"), bf16=False, processes=1)


def test_ppo_after_another_stage_of_the_same_process_loads_whole_models(zero3, monkeypatch):
    """transformers went on splitting every model as it was loaded, and the first forward pass outside of an engine met an empty embedding
    ("Padding_idx must be within num_embeddings")."""
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    from configs.schema import PPOStage
    from stages.ppo.zero.engines import zero_of_machine
    from stages.zero.load import announce

    announce(Train(precision="fp32"))
    assert is_deepspeed_zero3_enabled()
    cfg = PPOStage.model_validate({"name": "x", "init_from": "m", "prompts": "p", "scorers": [{"kind": "length", "target": 3}]})
    found = zero_of_machine(cfg)
    assert found is not None
    assert found.splits_weights
    assert not is_deepspeed_zero3_enabled()
