"""The search for canaries finds them in every form, or its silence would mean nothing. The real chain is searched in tests/chain/test_chain_real.py."""

from __future__ import annotations

import base64
import gzip
import json
import pickle

import pytest
import torch
from safetensors.torch import save_file
from tensorboardX import SummaryWriter

from tests.security.canaries import PROMPT, TOKENS, found

TOKEN = TOKENS["HF_TOKEN"]


@pytest.mark.parametrize("text", [PROMPT, *TOKENS.values()])
def test_every_hiding_place_is_looked_through(tmp_path, text):
    said = f"before it: {text}, and after"
    (tmp_path / "a.json").write_text(json.dumps({"x": said}))
    (tmp_path / "b.utf16").write_bytes(said.encode("utf-16-le"))
    for shift in range(3):
        (tmp_path / f"c{shift}.b64").write_bytes(base64.b64encode(b"x" * shift + said.encode()))
    (tmp_path / "d.pkl").write_bytes(pickle.dumps({"x": said}))
    torch.save({"x": said}, tmp_path / "e.pt")
    save_file({"x": torch.ones(1)}, tmp_path / "f.safetensors", metadata={"x": said})
    (tmp_path / "g.gz").write_bytes(gzip.compress(said.encode()))
    (tmp_path / "h.hex").write_text(said.encode().hex())
    with SummaryWriter(logdir=str(tmp_path), filename_suffix="i") as events:
        events.add_text("args", json.dumps({"x": said}))
    count, leaks = found(tmp_path, printed=said)
    assert count == 11
    assert {leak.split(":")[0].split("!")[0] for leak in leaks} == {path.name for path in tmp_path.iterdir()} | {"printed"}


def test_samples_may_hold_prompts_but_no_secrets(tmp_path):
    (tmp_path / "samples.jsonl").write_text(json.dumps({"prompt": PROMPT}))
    assert found(tmp_path) == (1, [])
    (tmp_path / "samples.jsonl").write_text(json.dumps({"prompt": PROMPT, "x": TOKEN}))
    assert len(found(tmp_path)[1]) == 1
