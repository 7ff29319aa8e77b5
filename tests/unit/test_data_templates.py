"""What the loss covers under every template by name, decoded and compared with text written by hand."""

from __future__ import annotations

from typing import Any

import pytest
from blake3 import blake3

from configs.errors import UserError
from configs.schema import SFTStage
from stages.data import Demonstration, Formatter, PreferencePair, as_messages, ensure_special_tokens, resolve_template
from stages.data.layouts import TOKENS
from stages.data.templates import BUILT_IN
from tests.unit.test_data_formatter import byte_tokenizer, parts, spaced_tokenizer, turns

HEAD, TURN = "<|start_header_id|>", "<|end_header_id|>\n\n"
# What comes before each answer, and the answer with its end of turn; [system], question, answer, question, answer.
SYSTEM = {
    "plain": ["System: Be kind\nUser: Hi\nAssistant:", " Yo<eos>", "\nUser: More\nAssistant:", " Ok<eos>"],
    "chatml": [
        "<|im_start|>system\nBe kind<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "Yo<eos>",
        "\n<|im_start|>user\nMore<|im_end|>\n<|im_start|>assistant\n", "Ok<eos>",
    ],
    "llama3": [
        f"{HEAD}system{TURN}Be kind<|eot_id|>{HEAD}user{TURN}Hi<|eot_id|>{HEAD}assistant{TURN}", "Yo<|eot_id|>",
        f"{HEAD}user{TURN}More<|eot_id|>{HEAD}assistant{TURN}", "Ok<|eot_id|>",
    ],
    "qwen": [
        "<|im_start|>system\nBe kind<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "Yo<|im_end|>",
        "\n<|im_start|>user\nMore<|im_end|>\n<|im_start|>assistant\n", "Ok<|im_end|>",
    ],
    "zephyr": [
        "<|system|>\nBe kind<eos>\n<|user|>\nHi<eos>\n<|assistant|>\n", "Yo<eos>", "\n<|user|>\nMore<eos>\n<|assistant|>\n", "Ok<eos>",
    ],
    "mistral": ["[INST] Be kind\n\nHi [/INST]", " Yo<eos>", "[INST] More [/INST]", " Ok<eos>"],
    "gemma": [
        "<start_of_turn>user\nBe kind\n\nHi<end_of_turn>\n<start_of_turn>model\n", "Yo<end_of_turn>",
        "\n<start_of_turn>user\nMore<end_of_turn>\n<start_of_turn>model\n", "Ok<end_of_turn>",
    ],
}  # fmt: skip
BARE = {  # the first prompt without a system prompt
    "plain": "User: Hi\nAssistant:",
    "chatml": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "llama3": f"{HEAD}user{TURN}Hi<|eot_id|>{HEAD}assistant{TURN}",
    "qwen": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "zephyr": "<|user|>\nHi<eos>\n<|assistant|>\n",
    "mistral": "[INST] Hi [/INST]",
    "gemma": "<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n",
}


def tokenizer_of(name: str, **options: Any) -> Any:
    """A byte tokenizer with the special tokens that a template needs; its EOS is another than the end of a turn."""
    return byte_tokenizer(("<eos>", *TOKENS.get(name, ())), **options)


def test_every_template_by_name_is_proven_here_and_named_in_the_configs():
    assert set(SYSTEM) | {"raw"} == set(BARE) | {"raw"} == set(BUILT_IN)
    assert all(name in str(SFTStage.model_fields["template"].description) for name in BUILT_IN)


@pytest.mark.parametrize("name", SYSTEM)
def test_the_loss_covers_the_assistants_turns_and_their_ends_and_nothing_else(name):
    formatter = Formatter(tokenizer_of(name), name)
    first, yo, second, ok = SYSTEM[name]
    row = Demonstration(turns("Hi", "Yo", "More", "Ok", system="Be kind"), "f:1")
    assert parts(formatter, row) == [(False, first), (True, yo), (False, second), (True, ok)]
    assert parts(formatter, row, "last") == [(False, first + yo + second), (True, ok)]
    assert parts(formatter, Demonstration(turns("Hi", "Yo"), "f:1")) == [(False, BARE[name]), (True, yo)]


@pytest.mark.parametrize("name", SYSTEM)
def test_a_rollout_stops_where_training_ends_a_turn(name):
    """One id ends every completion, what a rollout stops at holds it, and the next stage, which finds the template in the tokenizer, agrees."""
    tokenizer = tokenizer_of(name)
    special = ensure_special_tokens(tokenizer)
    formatter = Formatter(tokenizer, name, special.eos_ids)
    end = tokenizer.convert_tokens_to_ids(TOKENS.get(name, ("<eos>",))[-1])
    messages = turns("Hi", "Yo", "More", "Ok", system="Be kind")
    prompt, completion = formatter.prompt_ids(messages[:-1]), formatter.completion_ids("Ok", messages[:-1])
    assert completion[-1] == formatter.eos_id == end
    assert completion.count(end) == 1
    assert set(formatter.eos_ids) == {end, tokenizer.eos_token_id}
    assert formatter.demonstration(Demonstration(messages))["input_ids"] == prompt + completion
    # The reward model reads its score at the last id of a completion.
    assert formatter.pair(PreferencePair(messages[:-1], "Ok", "No"))["rejected_ids"][-1] == end
    assert formatter.completion_text(completion) == "Ok"
    later = Formatter(tokenizer, "auto", formatter.eos_ids)
    assert later.facts() == formatter.facts()
    assert later.template.name == name


@pytest.mark.parametrize("name", SYSTEM)
def test_bos_stands_first_once_where_the_tokenizer_has_it(name):
    formatter = Formatter(tokenizer_of(name, bos=True), name)
    assert formatter.decode(formatter.prompt_ids("Hi")) == "<bos>" + BARE[name]
    assert "<bos>" not in formatter.decode(formatter.completion_ids("Yo"))


@pytest.mark.parametrize("name", TOKENS)
def test_a_template_whose_tokens_are_missing_is_refused_with_those_that_work(name):
    with pytest.raises(UserError, match=rf"template '{name}' is made of special tokens, of which this tokenizer lacks .*{TOKENS[name][-1][2:-2]}.*plain, chatml, raw, zephyr, mistral$"):
        Formatter(byte_tokenizer(), name)
    for other in BUILT_IN:
        if other not in TOKENS:
            Formatter(spaced_tokenizer(), other).prompt_ids(as_messages("Hi"))


def test_the_digests_of_the_first_templates_are_kept():
    """They are contracts between stages: checkpoints that were published record them."""
    assert {name: blake3(BUILT_IN[name].encode()).hexdigest()[:16] for name in ("plain", "chatml", "raw")} == {
        "plain": "92c15a681e611e24", "chatml": "840a4ac63d1cad97", "raw": "fe6f3426649c70c7",
    }  # fmt: skip
    assert resolve_template(byte_tokenizer(), "plain").digest.startswith("92c15a681e611e24")
