"""Tokenisation: what is trained on is what a rollout sees; masks, EOS, BOS and pad against cases worked by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from configs.errors import UserError
from stages.data import (
    Demonstration,
    Formatter,
    Message,
    PreferencePair,
    Prompt,
    as_messages,
    encode_demonstrations,
    encode_pairs,
    encode_prompts,
    ensure_special_tokens,
    prove_loss_mask,
    resolve_template,
)
from stages.data.layouts import TOKENS
from stages.data.templates import BUILT_IN, Template

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content | trim + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# As Qwen3: an empty thinking block in the last answer only, so earlier turns are rewritten when the next one comes.
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{{ m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# As DeepSeek-R1: the generation prompt opens a thinking block that finished conversations do not have.
OPENING = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: <think>' }}{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)


def byte_tokenizer(specials: tuple[str, ...] = ("<eos>",), bos: bool = False, eos: str = "<eos>", **names: str) -> Any:
    """Every byte is a token (ids 0 to 255); `specials` follow. With `bos`, tokenizer("") gives [bos]."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    extra = ["<bos>"] if bos else []
    backend.add_special_tokens([*specials, *extra])
    if bos:
        names["bos_token"] = "<bos>"
        backend.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", backend.token_to_id("<bos>"))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=eos, additional_special_tokens=[s for s in specials if s not in names.values() and s != eos], **names
    )


def spaced_tokenizer() -> Any:
    """As the stories260K tokenizer: a normaliser puts "▁" before every text it is given; unk 0, <s> 1, </s> 2, bytes, words."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{i:02X}>": 3 + i for i in range(256)}
    for symbol in "▁Onceupathimrdbflgswky:.AUS":
        vocab.setdefault(symbol, len(vocab))
    merges = [("O", "n"), ("c", "e"), ("On", "ce"), ("▁", "Once"), ("▁", "t")]
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<unk>", "<s>", "</s>")])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>")


def turns(*texts: str, system: str = "") -> tuple[Message, ...]:
    first = (Message("system", system),) if system else ()
    return (*first, *(Message(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)))


def parts(formatter: Formatter, row: Demonstration, loss_on: str = "all") -> list[tuple[bool, str]]:
    """(under the loss?, text) per run of ids."""
    encoded = formatter.demonstration(row, loss_on)
    result: list[tuple[bool, list[int]]] = []
    for token, counts in zip(encoded["input_ids"], encoded["completion_mask"], strict=True):
        if not result or result[-1][0] != bool(counts):
            result.append((bool(counts), []))
        result[-1][1].append(token)
    return [(counts, formatter.decode(ids)) for counts, ids in result]


def test_plain_by_hand():
    formatter = Formatter(byte_tokenizer(), "plain")
    row = Demonstration(turns("Hi", "Yo", "More", "Ok", system="Be kind"), "f:1")
    assert parts(formatter, row) == [
        (False, "System: Be kind\nUser: Hi\nAssistant:"), (True, " Yo<eos>"), (False, "\nUser: More\nAssistant:"), (True, " Ok<eos>"),
    ]  # fmt: skip
    assert parts(formatter, row, "last") == [(False, "System: Be kind\nUser: Hi\nAssistant: Yo<eos>\nUser: More\nAssistant:"), (True, " Ok<eos>")]


def test_newline_after_the_end_token_is_never_part_of_a_completion():
    """Trap 19: a rollout stops at <|im_end|>, so nothing may learn what follows it in the template."""
    formatter = Formatter(byte_tokenizer(("<|im_start|>", "<|im_end|>"), eos="<|im_end|>"), Template("own", CHATML))
    row = Demonstration(turns("Hi", " Yo ", "More", "Ok"), "f:1")
    assert parts(formatter, row) == [
        (False, "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"), (True, "Yo<|im_end|>"),
        (False, "\n<|im_start|>user\nMore<|im_end|>\n<|im_start|>assistant\n"), (True, "Ok<|im_end|>"),
    ]  # fmt: skip
    assert formatter.completion_ids("Yo")[-1] == formatter.tokenizer.eos_token_id


def test_a_template_end_token_that_the_tokenizer_does_not_call_eos_ends_rollouts_too():
    tokenizer = byte_tokenizer(("<|im_start|>", "<|im_end|>", "<eos>"))
    formatter = Formatter(tokenizer, Template("own", CHATML))
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert formatter.completion_ids("Yo") == [*tokenizer("Yo").input_ids, end]
    assert formatter.eos_ids == (end, tokenizer.eos_token_id)


def test_eos_is_appended_where_the_template_has_none():
    bare = "{% for m in messages %}{{ m.role + '> ' + m.content + '\\n' }}{% endfor %}{% if add_generation_prompt %}assistant> {% endif %}"
    formatter = Formatter(byte_tokenizer(), Template("bare", bare))
    assert parts(formatter, Demonstration(turns("a", "b", "c", "d"), "f:1")) == [
        (False, "user> a\nassistant> "), (True, "b<eos>"), (False, "\nuser> c\nassistant> "), (True, "d<eos>"),
    ]  # fmt: skip


def test_text_between_answer_and_eos_belongs_to_the_completion():
    formatter = Formatter(byte_tokenizer(bos=True), Template("llama2", LLAMA2))
    assert parts(formatter, Demonstration(turns("a", "b"), "f:1")) == [(False, "<bos>[INST] a [/INST]"), (True, " b <eos>")]


def test_thinking_templates_train_the_last_turn_and_refuse_all():
    formatter = Formatter(byte_tokenizer(("<|im_start|>", "<|im_end|>"), eos="<|im_end|>"), Template("thinking", THINKING))
    row = Demonstration(turns("a", "b", "c", "d"), "f:7")
    assert parts(formatter, row, "last") == [
        (False, "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n"),
        (True, "<think>\n\n</think>\n\nd<|im_end|>"),
    ]
    with pytest.raises(UserError, match=r"f:7: the template 'thinking' rewrites earlier assistant turns.*loss_on: last"):
        formatter.demonstration(row)
    assert len(parts(formatter, Demonstration(turns("a", "b"), "f:8"))) == 2
    assert formatter.completion_text(formatter.completion_ids("d")) == "d"


def test_a_generation_prompt_that_answers_do_not_begin_with_is_refused():
    with pytest.raises(UserError, match="another beginning of its answer"):
        Formatter(byte_tokenizer(), Template("opening", OPENING))


@pytest.mark.parametrize("name", [name for name in BUILT_IN if name not in TOKENS])
@pytest.mark.parametrize("make", [byte_tokenizer, spaced_tokenizer, lambda: byte_tokenizer(bos=True)])
def test_prompt_and_completion_read_right_and_give_the_text_back(name, make):
    formatter = Formatter(make(), name)
    for text in ("Once upon a time", "the end.", "line\n\nline two", "  indented", "ünï — 😀"):
        prompt, completion = formatter.prompt_ids("Tell me."), formatter.completion_ids(text)
        assert completion[-1] == formatter.eos_id == formatter.tokenizer.eos_token_id
        assert completion.count(formatter.eos_id) == 1
        assert formatter.completion_text(completion) == text.removeprefix(" " if make is spaced_tokenizer and name not in ("plain", "mistral") else "")
        joined = formatter.decode(prompt + completion)
        eos = formatter.tokenizer.eos_token
        assert joined.endswith(text + eos)
        assert "Tell me." in joined
        if name == "plain":
            assert joined.endswith(f"User: Tell me.\nAssistant: {text}{eos}")


def test_a_tokenizer_that_puts_a_space_first_gets_one_space_not_two():
    formatter = Formatter(spaced_tokenizer(), "plain")
    tokens = formatter.tokenizer.convert_ids_to_tokens(formatter.completion_ids("Once"))
    assert tokens == ["▁Once", "</s>"]
    row = Demonstration(turns("Hi", "the end", "Once", "Once"), "f:1")
    assert formatter.decode(formatter.demonstration(row)["input_ids"]) == "User: Hi\nAssistant: the end</s>\nUser: Once\nAssistant: Once</s>"


@pytest.mark.parametrize("name", ["plain", "chatml"])
@pytest.mark.parametrize("make", [byte_tokenizer, spaced_tokenizer, lambda: byte_tokenizer(bos=True)])
def test_training_ids_are_the_ids_of_a_rollout(name, make):
    formatter = Formatter(make(), name)
    messages = turns("Hi there", "Once upon", "more: ", "the end", system="Be")
    rollout = formatter.prompt_ids(messages[:-1]) + formatter.completion_ids("the end")
    assert formatter.demonstration(Demonstration(messages))["input_ids"] == rollout
    pair = formatter.pair(PreferencePair(messages[:-1], "the end", "Once"))
    assert pair["prompt_ids"] + pair["chosen_ids"] == rollout
    assert pair["rejected_ids"] == formatter.completion_ids("Once", messages[:-1])
    # A dialogue that goes on begins with exactly the ids of the dialogue so far.
    longer = formatter.prompt_ids((*messages, Message("user", "again")))
    assert longer[: len(rollout)] == rollout


@pytest.mark.parametrize("name", [name for name in BUILT_IN if name not in TOKENS])
def test_bos_stands_first_once_when_the_tokenizer_has_it_by_default(name):
    with_bos, without = Formatter(byte_tokenizer(bos=True), name), Formatter(byte_tokenizer(), name)
    ids = with_bos.prompt_ids("Hi")
    bos = with_bos.tokenizer.bos_token_id
    assert ids[0] == bos
    assert ids.count(bos) == 1
    assert ids[1:] == without.prompt_ids("Hi")
    assert bos not in with_bos.completion_ids("Hi")
    spelled = with_bos.prompt_ids("<bos>") if name == "raw" else [bos]
    assert spelled[:2] != [bos, bos]


def test_eos_spelled_out_in_data_is_text():
    formatter = Formatter(byte_tokenizer(), "plain")
    ids = formatter.completion_ids("stop<eos>here")
    assert ids.index(formatter.eos_id) == len(ids) - 1
    assert formatter.completion_text(ids) == "stop<eos>here"


def test_raw_is_prompt_then_completion_and_single_turn():
    formatter = Formatter(byte_tokenizer(), "raw")
    assert formatter.decode(formatter.prompt_ids("Tell.\n") + formatter.completion_ids("Once")) == "Tell.\nOnce<eos>"
    with pytest.raises(UserError, match=r"f:2: .*'raw' cannot render turns of user, assistant, user.*no further turns"):
        formatter.demonstration(Demonstration(turns("a", "b", "c", "d"), "f:2"))


def test_auto_takes_the_tokenizers_own_and_survives_saving(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = byte_tokenizer()
    first = Formatter(tokenizer, "auto")
    assert first.template.name == "plain"
    tokenizer.save_pretrained(tmp_path)
    again = Formatter(AutoTokenizer.from_pretrained(tmp_path), "auto")
    assert again.facts() == first.facts()
    own = byte_tokenizer(("<|im_start|>", "<|im_end|>"), eos="<|im_end|>")
    own.chat_template = CHATML
    assert resolve_template(own).name == "tokenizer"
    assert resolve_template(own).digest != resolve_template(own, "chatml").digest


def test_templates_from_files(tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text(CHATML)
    assert resolve_template(byte_tokenizer(), str(path)).jinja == CHATML
    with pytest.raises(UserError, match="'plane': no such file, and not one of auto, plain, chatml, raw"):
        resolve_template(byte_tokenizer(), "plane")
    path.write_text("{% for m in %}")
    with pytest.raises(UserError, match=r"'mine\.jinja' cannot render"):
        Formatter(byte_tokenizer(), str(path))
    path.write_text("{{ messages.__class__.__mro__ }}")
    with pytest.raises(UserError, match="cannot render"):
        Formatter(byte_tokenizer(), str(path))
    path.write_text("nothing of what is said")
    with pytest.raises(UserError, match="does not show what the assistant says"):
        Formatter(byte_tokenizer(), str(path))


def config(**values: Any) -> SimpleNamespace:
    return SimpleNamespace(**values)


def test_pad_is_kept_when_it_is_no_eos():
    found = ensure_special_tokens(spaced_tokenizer(), config(eos_token_id=1, vocab_size=512), None, config(eos_token_id=1))
    # The tokenizer ends with </s> = 2 though the model's config says <s> = 1: rollouts stop at both, rows end with the tokenizer's.
    assert (found.pad_id, found.eos_id, found.eos_ids, found.notes) == (0, 2, (2, 1), ())


def test_pad_is_never_an_eos_of_the_model():
    """As Qwen2.5-Instruct: pad <|endoftext|> is not the tokenizer's EOS, but the generation config stops at it."""
    tokenizer = byte_tokenizer(("<|endoftext|>", "<|im_end|>", "<|reserved_1|>", "<|fim_pad|>"), eos="<|im_end|>", pad_token="<|endoftext|>")
    found = ensure_special_tokens(tokenizer, config(vocab_size=512), config(eos_token_id=[257, 256]))
    assert found.eos_ids == (257, 256)
    assert tokenizer.pad_token == "<|fim_pad|>"
    assert found.pad_id == tokenizer.pad_token_id == 259
    assert "'<|endoftext|>' is also an EOS" in found.notes[0]


@pytest.mark.parametrize(
    ("specials", "names", "expected", "grows"),
    [
        (("<eos>", "<|reserved_7|>", "<unk>"), {"unk_token": "<unk>"}, "<|reserved_7|>", False),
        (("<eos>", "<unk>"), {"unk_token": "<unk>"}, "<unk>", False),
        (("<eos>",), {"unk_token": "<eos>"}, "<|pad|>", True),
        (("<eos>",), {"pad_token": "<eos>"}, "<|pad|>", True),
    ],
)
def test_which_token_pads(specials, names, expected, grows):
    tokenizer = byte_tokenizer(specials, **names)
    size = len(tokenizer)
    found = ensure_special_tokens(tokenizer, config(eos_token_id=None, vocab_size=size))
    assert tokenizer.pad_token == expected
    assert found.pad_id not in found.eos_ids
    assert found.vocabulary == size + grows


def test_a_pad_that_ends_completions_is_refused_until_mended():
    tokenizer = byte_tokenizer(pad_token="<eos>")
    with pytest.raises(UserError, match="the pad token '<eos>' also ends completions"):
        Formatter(tokenizer, "plain")
    # Here pad is no EOS of tokenizer or model, but the one the template ends turns with.
    with pytest.raises(UserError, match=r"'<\|im_end\|>' also ends completions"):
        Formatter(byte_tokenizer(("<|im_start|>", "<|im_end|>", "<eos>"), pad_token="<|im_end|>"), Template("own", CHATML))
    ensure_special_tokens(tokenizer)
    assert Formatter(tokenizer, "plain").facts()["pad_id"] == len(tokenizer) - 1


def test_without_any_eos_there_is_an_error():
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="names an EOS"):
        ensure_special_tokens(tokenizer, config(eos_token_id=None))
    assert ensure_special_tokens(tokenizer, config(eos_token_id=256)).eos_id == 256
    assert tokenizer.eos_token == "<eos>"


def test_lengths_limits_and_drops_by_hand():
    formatter = Formatter(byte_tokenizer(), "raw")
    # One token per byte: prompt + completion + EOS.
    rows = [Demonstration(turns("abc", "d" * n), f"f:{n}") for n in (1, 6, 7)]
    kept, dropped = encode_demonstrations(formatter, rows, max_length=10)
    assert ([len(row["input_ids"]) for row in kept], dropped) == ([5, 10], 1)
    with pytest.raises(UserError, match="f:7: has 11 tokens, more than max_length = 10"):
        encode_demonstrations(formatter, rows, 10, "error")
    with pytest.raises(UserError, match=r"all 3 rows are longer than max_length = 4 tokens; the longest has 11 \(f:7\): raise max_length by 7"):
        encode_demonstrations(formatter, rows, 4)
    assert encode_demonstrations(formatter, rows, 4, may_be_empty=True) == ([], 3)

    pairs = [PreferencePair(as_messages("abc"), "d", "e" * n, margin, f"p:{n}") for n, margin in ((6, None), (7, 0.5))]
    encoded, dropped = encode_pairs(formatter, pairs, 11)
    assert (dropped, [row["margin"] for row in encoded]) == (0, [0.0, 0.5])
    assert "margin" not in encode_pairs(formatter, pairs[:1], 11)[0][0]
    assert encode_pairs(formatter, pairs, 10)[1] == 1
    assert [row["row"] for row in encode_pairs(formatter, pairs, 10)[0]] == pairs[:1]
    assert encode_pairs(formatter, pairs, 4, may_be_empty=True) == ([], 2)

    prompts = [Prompt(as_messages("x" * n), {"k": n}) for n in (3, 6, 7)]
    encoded, dropped = encode_prompts(formatter, prompts, max_length=10, max_new_tokens=4)
    assert ([row["row"].columns["k"] for row in encoded], dropped) == ([3, 6], 1)
    with pytest.raises(UserError, match="leaves no room"):
        encode_prompts(formatter, prompts, 10, 10)
    with pytest.raises(UserError, match=r"max_length - max_new_tokens = 2"):
        encode_prompts(formatter, prompts, 6, 4)


def test_pairs_that_become_the_same_tokens_are_refused():
    formatter = Formatter(byte_tokenizer(("<|im_start|>", "<|im_end|>"), eos="<|im_end|>"), Template("own", CHATML))
    pair = PreferencePair(as_messages("a"), "same", "\nsame", None, "f:3")
    with pytest.raises(UserError, match="f:3: chosen and rejected differ in the file but are the same tokens"):
        encode_pairs(formatter, [pair], 100)


def test_the_loss_mask_is_proven():
    formatter = Formatter(byte_tokenizer(), "plain")
    rows = [Demonstration(turns("q", f"answer {i}", "more", "end"), f"f:{i}") for i in range(9)]
    encoded, _ = encode_demonstrations(formatter, rows, 200)
    shown = prove_loss_mask(formatter, encoded)
    assert shown == [f" answer {i}<eos> …  end<eos>" for i in (0, 3, 6)]
    assert prove_loss_mask(formatter, encoded[:2]) == [f" answer {i}<eos> …  end<eos>" for i in (0, 1)]
    where = [row.where for row in rows]
    for change, expected in (
        (lambda mask: [0] * len(mask), "f:8: the loss covers no token"),
        (lambda mask: [1] * len(mask), "f:8: the loss covers all"),
        (lambda mask: mask[1:], "f:8: the loss mask has"),
    ):
        broken = [*encoded[:8], {**encoded[8], "completion_mask": change(encoded[8]["completion_mask"])}]
        with pytest.raises(UserError, match=expected):
            prove_loss_mask(formatter, broken, where=where)
    with pytest.raises(UserError, match="no rows"):
        prove_loss_mask(formatter, [])


def test_data_imports_neither_torch_nor_transformers():
    import subprocess
    import sys

    code = "import sys, stages.data, launch.data_cli; print([m for m in ('torch', 'transformers', 'datasets', 'pyarrow') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
