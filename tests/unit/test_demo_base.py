"""The demo's base model: what its text teaches, what its folder holds, and what a failure leaves behind."""

from __future__ import annotations

import json
import random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from launch.demo import base, world

TINY = {"steps": 3, "batch_size": 4, "hidden_size": 16, "layers": 1, "heads": 2, "vocabulary": 320}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "base"
    base.train_base(str(folder), seed=1, **TINY)
    return folder


def test_folder_is_a_plain_model_without_a_chat_template(trained) -> None:
    tokenizer = AutoTokenizer.from_pretrained(trained)
    model = AutoModelForCausalLM.from_pretrained(trained)
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}) == 3
    assert tokenizer.chat_template is None
    assert (model.config.pad_token_id, model.config.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)
    assert model.config.vocab_size == len(tokenizer)
    assert json.loads((trained / "base.json").read_text())["arguments"]["steps"] == 3
    assert not list(trained.parent.glob(".base*"))


def test_tokenizer_gives_every_text_back(trained) -> None:
    tokenizer = AutoTokenizer.from_pretrained(trained)
    rng = random.Random(0)
    for text in ("".join(base.draw_document(rng)) for _ in range(50)):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
        assert tokenizer.bos_token_id not in ids


def test_same_seed_same_weights(trained, tmp_path) -> None:
    base.train_base(str(tmp_path / "again"), seed=1, **TINY)
    base.train_base(str(tmp_path / "other"), seed=2, **TINY)
    again, other = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("again", "other"))
    for name, weight in AutoModelForCausalLM.from_pretrained(trained).state_dict().items():
        assert torch.equal(weight, again[name]), name
    assert not torch.equal(other["model.embed_tokens.weight"], again["model.embed_tokens.weight"])


def test_failed_run_leaves_the_old_folder(tmp_path, monkeypatch) -> None:
    folder = tmp_path / "base"
    base.train_base(str(folder), seed=1, **TINY)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(base.PreTrainedTokenizerFast, "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        base.train_base(str(folder), seed=2, **TINY)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_only_what_follows_the_beginning_is_learnt() -> None:
    rng = random.Random(0)
    tokenizer = base.build_tokenizer(("".join(base.draw_document(rng)) for _ in range(200)), 400)
    for batch in base._batches(tokenizer, rng, steps=2, batch_size=8):
        for ids, real, learnt in zip(*batch, strict=True):
            shown, predicted = tokenizer.decode(ids[real & ~learnt]), tokenizer.decode(ids[learnt])
            assert ids[real][-1] == tokenizer.eos_token_id
            assert shown.startswith(("List:", "Ticket:", "User:"))
            if shown.startswith("List:"):
                listed = shown.removeprefix("List:").removesuffix("\nAgain:")
                assert predicted == listed + "<eos>"
            else:
                assert shown.endswith(("Note:", "Form:")) or "Assistant:" in predicted


def test_dialogues_have_the_form_of_the_plain_template() -> None:
    from stages.data import Formatter, as_messages

    rng = random.Random(0)
    tokenizer = base.build_tokenizer(("".join(base.draw_document(rng)) for _ in range(200)), 400)
    formatter = Formatter(tokenizer, "plain")
    case = world.draw_case(rng)
    ids = formatter.prompt_ids(as_messages(case.message)) + formatter.completion_ids("Hello.")
    assert tokenizer.decode(ids) == f"User: {case.message}\nAssistant: Hello.<eos>"
