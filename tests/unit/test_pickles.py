"""Which files of a save are read as pickles before anything opens them."""

from __future__ import annotations

import json

import pytest

from configs.errors import UserError
from stages.foreign import check_folder
from stages.training import pickles


def test_a_safetensors_file_that_begins_as_a_pickle_does_is_none(tmp_path):
    """Its first byte is the lowest of its header's length: 0x80 for one file in 32. A resumed adapter was refused for it."""
    header = json.dumps({}).encode().ljust(0x280)
    (tmp_path / "adapter_model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    assert (tmp_path / "adapter_model.safetensors").read_bytes()[:2] == b"\x80\x02", "as pickle's protocol 2 begins"
    pickles.check(tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model")
    with pytest.raises(UserError, match="not opened"):
        pickles.check(tmp_path)


def test_a_run_whose_folder_was_moved_goes_on(tmp_path):
    """The best save stands in the Trainer's state with the whole path that it had."""
    save = tmp_path / "resume" / "checkpoint-4"
    save.mkdir(parents=True)
    elsewhere = tmp_path / "before" / "checkpoint-2"
    (save / "trainer_state.json").write_text(json.dumps({"best_model_checkpoint": str(elsewhere)}))
    pickles.check(save)
    elsewhere.mkdir(parents=True)
    with pytest.raises(UserError, match="not beside this one"):
        pickles.check(save)


@pytest.mark.parametrize(
    ("settings", "refused"),
    [
        ({"init_lora_weights": "gaussian"}, None),
        ({"auto_mapping": {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers.models.llama.modeling_llama"}}, None),
        ({"auto_mapping": {"base_model_class": "A", "parent_library": "transformers_evil"}}, "auto_mapping"),
        ({"init_lora_weights": "olora"}, "init_lora_weights"),
    ],
)
def test_adapters_as_peft_writes_them_are_taken(tmp_path, settings, refused):
    """Without a task_type it notes the base's class."""
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"} | settings))
    if refused is None:
        check_folder(tmp_path)
    else:
        with pytest.raises(UserError, match=refused):
            check_folder(tmp_path)
