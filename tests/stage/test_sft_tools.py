"""SFT on tool turns, and the stage after it, which reads and ends turns as the template that SFT was given does."""

from __future__ import annotations

import json

import pytest

from configs.errors import UserError
from stages import models
from stages.data import encode_demonstrations, prove_loss_mask, read_demonstrations
from stages.tokens import load_tokens
from tests.stage.runs import run, settings, write_rows
from tests.tiny import tiny_model, tiny_tokenizer
from tests.unit.test_data_reading import assistant, user
from tests.unit.test_data_tools import call, calling, result

TURN_TOKENS = ["<|im_start|>", "<|im_end|>"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """base/, whose tokenizer has Qwen's turn tokens, and rows with a call, its result and an answer."""
    folder = tmp_path_factory.mktemp("tools")
    tiny_model(folder / "base", vocabulary=261)
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": TURN_TOKENS})
    tokenizer.save_pretrained(folder / "base")
    rows = [{"messages": [user(f"rain {i}?"), calling(call(f"c{i}")), result("sun"), assistant("no")]} for i in range(24)]
    write_rows(folder / "sft.jsonl", rows)
    write_rows(folder / "pairs.jsonl", [{"prompt": f"rain {i}?", "chosen": "no", "rejected": f"yes {i}"} for i in range(24)])
    return folder


def test_sft_on_tool_turns_and_dpo_after_it_end_turns_alike(place):
    train = {"max_steps": 2, "eval_every": 2}
    sft = run("sft", settings(place, "sft", train, template="qwen", max_length=300))
    recorded = sft.info("tokenizer")
    assert recorded["template"] == "qwen"
    end = 260  # <|im_end|>; the base's own EOS stays one that rollouts stop at
    assert (recorded["eos_id"], recorded["eos_ids"]) == (end, [end, 258])
    assert json.loads((sft.model_dir / "generation_config.json").read_text())["eos_token_id"] == [end, 258]

    tokens = load_tokens(models.find(sft.ref, place / "registry"))
    assert tokens.facts == {key: recorded[key] for key in tokens.facts}
    row = read_demonstrations([_source(place)]).rows[0]
    (covered,) = prove_loss_mask(tokens.formatter, encode_demonstrations(tokens.formatter, [row], 300)[0])
    assert covered == '<tool_call>\n{"name": "weather", "arguments": {"city": "c0"}}\n</tool_call><|im_end|> … no<|im_end|>'

    dpo = run("dpo", settings(place, "dpo", train, init_from=sft.ref, max_length=300))
    assert {key: dpo.info("tokenizer")[key] for key in ("template_digest", "eos_ids", "pad_id")} == {
        key: recorded[key] for key in ("template_digest", "eos_ids", "pad_id")
    }


def test_sft_on_tool_turns_without_such_a_template_is_refused(place):
    with pytest.raises(UserError, match=r"sft\.jsonl:\d+: the row has tool turns or `tools`, which the template 'plain' cannot show; set `template` to llama3 or qwen"):
        run("sft", settings(place, "sft", name="refused", max_length=300))


def _source(place):
    from configs.schema.common import Source

    return Source(path=str(place / "sft.jsonl"))
