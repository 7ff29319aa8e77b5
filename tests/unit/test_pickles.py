"""Which files of a save are read as pickles before anything opens them."""

from __future__ import annotations

import json

import pytest

from configs.errors import UserError
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
