"""The contract between stages, and the search for weights that are not numbers."""

import json
import struct

import pytest

from configs.errors import UserError
from stages.registry import Parent, Registry, contract
from stages.registry.finite import nonfinite_tensors
from tests.unit.registry_samples import publish

TOKENIZER = {"digest": "d" * 64, "template_digest": "t" * 64, "template": "plain", "eos_ids": [2], "pad_id": 0}


@pytest.fixture
def registry(tmp_path):
    return Registry(tmp_path / "registry")


def test_one_tokenizer_and_one_template(registry):
    mine = publish(registry, tokenizer=TOKENIZER)
    other = publish(registry, "reward/demo", tokenizer=TOKENIZER)
    contract.check_same_tokenizer(mine, other)
    contract.check_template(mine, other)
    contract.check_same_tokenizer(mine, TOKENIZER)
    different = publish(registry, "reward/x", tokenizer=TOKENIZER | {"digest": "e" * 64, "template_digest": "u" * 64})
    with pytest.raises(UserError, match=r"sft/demo@1 and reward/x@1 have different tokenizers \(dddd.*and eeee"):
        contract.check_same_tokenizer(mine, different)
    with pytest.raises(UserError, match="different chat templates"):
        contract.check_template(mine, different)
    with pytest.raises(UserError, match=r"reward/y@1 does not record its tokenizer \(digest\)"):
        contract.check_same_tokenizer(mine, publish(registry, "reward/y"))


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"eos_ids": [2, 0]}, "pad token and end-of-text token are both id 0"),
        ({"eos_ids": []}, "no end-of-text token"),
        ({"pad_id": None}, "no pad token"),
    ],
)
def test_padding_is_not_the_end_of_a_text(facts, message):
    contract.check_pad_eos(TOKENIZER, "sft/demo@1")
    with pytest.raises(UserError, match=message):
        contract.check_pad_eos(TOKENIZER | facts, "sft/demo@1")


SPLIT = {"seed": 0, "validation": 0.05, "test": 0.1, "always_test": None}


def test_all_that_a_model_descends_from_was_trained_under_one_split(registry):
    other = publish(registry, "sft/a", data={"split": SPLIT | {"seed": 1}})
    same = publish(registry, "sft/b", data={"split": SPLIT})
    plain = publish(registry, "sft/c")
    family = [registry.ancestors(publish(registry, "ppo/x", data={"split": SPLIT}, parents=[Parent.of(p, "init_from")])) for p in (same, plain)]
    for members in family:
        assert len(members) == 2
        contract.check_split(members, SPLIT, "give up")
    child = publish(registry, "ppo/y", data={"split": SPLIT}, parents=[Parent.of(same, "reference"), Parent.of(other, "scorer")])
    with pytest.raises(UserError, match=r"sft/a@1, from which ppo/y@1 descends, was .* split\.seed is 0 here and 1 there.* or give up"):
        contract.check_split(registry.ancestors(child), SPLIT, "give up")
    with pytest.raises(UserError, match=r"sft/b@1 was trained under another split: split\.test_prompts names other prompts"):
        contract.check_split([same], SPLIT | {"always_test": "f" * 64}, "give up")


def test_an_adapter_goes_on_its_own_base_only(registry, tmp_path):
    base, newer = publish(registry), publish(registry)
    contract.check_base_under_adapter(base, newer)  # no adapter: nothing to check
    adapter = publish(registry, "dpo/a", stage_info={"adapter": {"base": "sft/demo", "base_id": base.id, "base_digest": None}})
    contract.check_base_under_adapter(adapter, base)
    contract.check_base_under_adapter(adapter, base.id)
    for wrong in (newer, newer.id, "sft/demo"):
        with pytest.raises(UserError, match="is an adapter trained on"):
            contract.check_base_under_adapter(adapter, wrong)
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    facts = {"base": str(folder), "base_id": None, "base_digest": contract.folder_digest(folder)}
    outside = publish(registry, "dpo/b", stage_info={"adapter": facts})
    contract.check_base_under_adapter(outside, folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(UserError, match="its weights mean nothing there"):
        contract.check_base_under_adapter(outside, folder)


def test_the_score_is_read_where_rollouts_end(registry):
    contract.check_score_position(publish(registry, "reward/a", stage_info={"score_position": "last_token"}))
    with pytest.raises(UserError, match="reads its score at pad_token, rollouts are scored at last_token"):
        contract.check_score_position(publish(registry, "reward/a", stage_info={"score_position": "pad_token"}))
    with pytest.raises(UserError, match="a place it does not record"):
        contract.check_score_position(publish(registry, "reward/a"))


def test_an_unhealthy_checkpoint_is_refused(registry):
    contract.check_healthy(publish(registry, metrics={"loss": 1.0}))
    with pytest.raises(UserError, match=r"sft/demo@2 records metrics\.eval\[1\] = nan"):
        contract.check_healthy(publish(registry, metrics={"eval": [1.0, float("nan")]}))


# little-endian bit patterns, from the definitions of the formats: finite ones first
PATTERNS = {
    "F64": ("<Q", [0x7FEFFFFFFFFFFFFF, 0], [0x7FF0000000000000, 0xFFF8000000000000]),
    "F32": ("<I", [0x7F7FFFFF, 0x80000000], [0x7F800000, 0xFFC00000]),
    "F16": ("<H", [0x7BFF, 0x8000], [0x7C00, 0xFE00]),
    "BF16": ("<H", [0x7F7F, 0x8000], [0x7F80, 0xFFC0]),
    "F8_E5M2": ("<B", [0x7B, 0x80], [0x7C, 0xFE]),
    "F8_E4M3": ("<B", [0x7E, 0x80], [0x7F, 0xFF]),
}


def _file(path, dtype, code, values):
    data = b"".join(struct.pack(code, value) for value in values)
    good = struct.pack("<f", 1.0)
    header = {
        "good": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
        "bad": {"dtype": dtype, "shape": [len(values)], "data_offsets": [4, 4 + len(data)]},
        "__metadata__": {"format": "pt"},
    }
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + good + data)


@pytest.mark.parametrize("dtype", PATTERNS)
def test_nan_and_infinity_are_found_in_every_float_format(tmp_path, dtype):
    code, finite, broken = PATTERNS[dtype]
    _file(tmp_path / "model.safetensors", dtype, code, finite)
    contract.check_finite(tmp_path)
    for value in broken:
        _file(tmp_path / "model.safetensors", dtype, code, [*finite, value, *finite])
        assert list(nonfinite_tensors(tmp_path / "model.safetensors")) == [("bad", 1)]
        with pytest.raises(UserError, match=r"1 of the numbers in tensor 'bad' of model\.safetensors"):
            contract.check_finite(tmp_path)


def test_integers_are_not_taken_for_floats_and_blocks_are_all_read(tmp_path, monkeypatch):
    _file(tmp_path / "model.safetensors", "I32", "<i", [0x7F800000])
    contract.check_finite(tmp_path)
    monkeypatch.setattr("stages.registry.finite._BLOCK", 2)
    _file(tmp_path / "model.safetensors", "F32", "<I", [0, 0, 0, 0, 0x7F800000])
    assert list(nonfinite_tensors(tmp_path / "model.safetensors")) == [("bad", 1)]


@pytest.mark.parametrize("content", [b"", b"1234567", b"\xff" * 16, b"\x02" + b"\0" * 7 + b"[]", b"\x02" + b"\0" * 7 + b"{}x"])
def test_what_is_not_a_whole_safetensors_file_is_refused(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="not a whole safetensors file"):
        contract.check_finite(tmp_path)
