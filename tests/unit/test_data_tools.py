"""Tool turns: what is read and refused, what a template must show, and what the loss covers, by hand."""

from __future__ import annotations

import json
from typing import Any

import pytest

from configs.errors import UserError
from configs.schema.common import Source
from stages.data import (
    Demonstration,
    Formatter,
    Message,
    encode_demonstrations,
    fingerprint,
    prove_loss_mask,
    read_demonstrations,
    read_pairs,
    read_prompts,
)
from stages.data.layouts import WITH_TOOLS
from stages.data.templates import BUILT_IN, Template
from stages.validation.rows import question
from tests.unit.test_data_cli import run as run_cli
from tests.unit.test_data_formatter import byte_tokenizer, parts, turns
from tests.unit.test_data_reading import assistant, user, write
from tests.unit.test_data_templates import HEAD, TURN, tokenizer_of

SCHEMA = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}}


def call(city: str, **fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "weather", "arguments": {"city": city}}, **fields}


def calling(*calls: dict[str, Any], content: str | None = None) -> dict[str, Any]:
    return {"role": "assistant", "content": content, "tool_calls": list(calls)}


def result(text: str, **fields: str) -> dict[str, str]:
    return {"role": "tool", "content": text, **fields}


ROW = {
    "messages": [{"role": "system", "content": "Be kind"}, user("Rain?"), calling(call("Ürgüp")), result("sun <b>"), assistant("No."), user("Sure?"), assistant("Yes.")],
    "tools": [SCHEMA],
}  # fmt: skip
COMPACT = json.dumps(SCHEMA)
EXPECTED = {
    "qwen": [
        "<|im_start|>system\nBe kind\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with function signatures "
        f"within <tools></tools> XML tags:\n<tools>\n{COMPACT}\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
        '<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\nRain?<|im_end|>\n<|im_start|>assistant\n",
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Ürgüp"}}\n</tool_call><|im_end|>',
        "\n<|im_start|>user\n<tool_response>\nsun <b>\n</tool_response><|im_end|>\n<|im_start|>assistant\n", "No.<|im_end|>",
        "\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n", "Yes.<|im_end|>",
    ],
    "llama3": [
        f"{HEAD}system{TURN}Be kind<|eot_id|>{HEAD}user{TURN}Given the following functions, please respond with a JSON for a function call with its proper "
        'arguments that best answers the given prompt.\n\nRespond in the format {"name": function name, "parameters": dictionary of argument name and its value}. '
        f"Do not use variables.\n\n{json.dumps(SCHEMA, indent=4)}\n\nRain?<|eot_id|>{HEAD}assistant{TURN}",
        '{"name": "weather", "parameters": {"city": "Ürgüp"}}<|eot_id|>',
        f"{HEAD}ipython{TURN}sun <b><|eot_id|>{HEAD}assistant{TURN}", "No.<|eot_id|>",
        f"{HEAD}user{TURN}Sure?<|eot_id|>{HEAD}assistant{TURN}", "Yes.<|eot_id|>",
    ],
}  # fmt: skip


def read(folder, row: dict[str, Any]) -> Demonstration:
    (found,) = read_demonstrations([write(folder, [row])]).rows
    return found


@pytest.mark.parametrize("name", WITH_TOOLS)
def test_the_loss_covers_calls_and_answers_and_no_result(tmp_path, name):
    formatter, row = Formatter(tokenizer_of(name), name), read(tmp_path, ROW)
    texts = EXPECTED[name]
    assert parts(formatter, row) == [(index % 2 == 1, text) for index, text in enumerate(texts)]
    assert parts(formatter, row, "last") == [(False, "".join(texts[:-1])), (True, texts[-1])]
    (shown,) = prove_loss_mask(formatter, encode_demonstrations(formatter, [row], 5000)[0])
    assert shown == " … ".join(texts[1::2])
    # What a rollout is given before the last answer is what training has there; so is what `evaluation:` asks.
    ids = formatter.demonstration(row)["input_ids"]
    before = ids[: len(ids) - len(formatter.completion_ids("Yes.", row.prompt))]
    assert formatter.prompt_ids(row.prompt, row.tools) == question(formatter, row).prompt_ids == before


@pytest.mark.parametrize("name", WITH_TOOLS)
def test_a_row_may_end_with_a_call_and_have_no_schemas(tmp_path, name):
    formatter, row = Formatter(tokenizer_of(name), name), read(tmp_path, {"messages": [user("Rain?"), calling(call("Rome"))]})
    covered = [text for counts, text in parts(formatter, row, "last") if counts]
    assert covered == [EXPECTED[name][1].replace("Ürgüp", "Rome")]
    assert row.completion == ""


def test_qwen_has_text_beside_several_calls_and_their_results_in_one_turn(tmp_path):
    turn = calling(call("Rome", id="a"), call("Oslo", id="b"), content="Let me look.")
    row = read(tmp_path, {"messages": [user("Rain?"), turn, result("sun", tool_call_id="a", name="weather"), result("", tool_call_id="b"), assistant("Both.")]})
    one, other = (f'<tool_call>\n{{"name": "weather", "arguments": {{"city": "{city}"}}}}\n</tool_call>' for city in ("Rome", "Oslo"))
    assert parts(Formatter(tokenizer_of("qwen"), "qwen"), row)[1:] == [
        (True, f"Let me look.\n{one}\n{other}<|im_end|>"),
        (False, "\n<|im_start|>user\n<tool_response>\nsun\n</tool_response>\n<tool_response>\n\n</tool_response><|im_end|>\n<|im_start|>assistant\n"),
        (True, "Both.<|im_end|>"),
    ]
    with pytest.raises(UserError, match=r"rows\.jsonl:1: the template 'llama3' cannot render .*one tool call and no text beside it"):
        Formatter(tokenizer_of("llama3"), "llama3").demonstration(row)


def test_a_template_that_objects_to_tool_turns_is_told_with_those_that_do_not(tmp_path):
    strict = WHOLE.replace("{% for m in messages %}", "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('roles must alternate') }}{% endif %}")
    with pytest.raises(UserError, match=r"'own' cannot render turns of system, user, assistant, tool, .*: roles must alternate; .*llama3 or qwen$"):
        Formatter(tokenizer_of("qwen"), Template("own", strict)).demonstration(read(tmp_path, ROW))


def test_json_text_and_objects_read_the_same(tmp_path):
    written = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Ürgüp"}'}}
    nulls = {"name": None, "tool_call_id": None, "tool_calls": None}  # as parquet fills columns
    messages = [nulls | turn for turn in (*ROW["messages"][:2], calling(written), *ROW["messages"][3:])]
    assert read(tmp_path, {"messages": messages, "tools": json.dumps([SCHEMA["function"]])}) == read(tmp_path, ROW)


def test_a_columnar_file_gives_no_call_the_arguments_of_another_tool(tmp_path):
    import pyarrow
    import pyarrow.parquet

    clock = {"type": "function", "function": {"name": "clock", "arguments": {"zone": "UTC"}}}
    rows = [ROW, {"messages": [user("When?"), calling(clock)], "tools": [{"type": "function", "function": {"name": "clock", "description": "Time"}}]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert pyarrow.parquet.read_table(tmp_path / "rows.parquet").to_pylist()[1]["messages"][1]["tool_calls"][0]["function"]["arguments"]["city"] is None
    found = read_demonstrations([Source(path=str(tmp_path / "rows.parquet"))]).rows
    written = read_demonstrations([write(tmp_path, rows)]).rows
    assert [fingerprint([row]) for row in found] == [fingerprint([row]) for row in written]


def test_fingerprints_tell_tool_turns_apart_and_others_keep_theirs(tmp_path):
    rows = [read(tmp_path, ROW | {"messages": [*ROW["messages"][:2], calling(call(city)), *ROW["messages"][3:]]}) for city in ("Rome", "Oslo")]
    rows.append(Demonstration(rows[0].messages))
    assert len({fingerprint([row]) for row in rows}) == 3
    # As before rows could hold tool turns.
    assert fingerprint([Demonstration(turns("Hi", "Yo", system="Be kind"))]).startswith("092baf0e0b982b8a")


@pytest.mark.parametrize("name", [name for name in BUILT_IN if name not in WITH_TOOLS])
def test_a_template_without_tools_is_refused_with_those_that_have_them(tmp_path, name):
    formatter = Formatter(tokenizer_of(name), name)
    for row in (ROW, {"messages": [user("Rain?"), assistant("No.")], "tools": [SCHEMA]}):
        with pytest.raises(UserError, match=rf"rows\.jsonl:1: .*the template '{name}' cannot show; set `template` to llama3 or qwen"):
            formatter.demonstration(read(tmp_path, row))


# Everything a row has, in chatml; each part can be left out.
WHOLE = (
    "{% for t in tools or [] %}{{ t.function.name }};{% endfor %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content }}"
    "{% for c in m.tool_calls or [] %}{{ '>' + c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@pytest.mark.parametrize(
    ("left_out", "instead", "what"),
    [
        ("{{ t.function.name }}", "", "the `tools` of a row"),
        ("c.function.name", "''", "the name of a tool call"),
        ("{{ c.function.arguments | tojson }}", "", "the arguments of a tool call"),
        ("m.content", "(m.content if m.role != 'tool' else '')", "the result of a tool"),
        ("m.content", "(m.content if not m.tool_calls else '')", "the text beside a tool call"),
    ],
)
def test_another_template_must_show_every_part(tmp_path, left_out, instead, what):
    row = read(tmp_path, {"messages": [user("Rain?"), calling(call("Rome"), content="Look:"), result("sun"), assistant("No.")], "tools": [SCHEMA]})
    tokenizer = tokenizer_of("qwen")
    covered = [text for counts, text in parts(Formatter(tokenizer, Template("own", WHOLE)), row) if counts]
    assert covered == ['Look:>weather{"city": "Rome"}<|im_end|>', "No.<|im_end|>"]
    assert left_out in WHOLE
    with pytest.raises(UserError, match=f"the template 'own' does not show {what}; set `template` to llama3 or qwen"):
        Formatter(tokenizer, Template("own", WHOLE.replace(left_out, instead))).demonstration(row)


BAD = [
    ([user("a"), calling(call("x")), assistant("b")], r"'messages\[2\]' is a turn of assistant after assistant with tool_calls; expected tool"),
    ([user("a"), assistant("b"), result("c"), assistant("d")], r"'messages\[2\]' is a turn of tool after assistant; expected user"),
    ([user("a"), calling(call("x")), result("c"), user("d"), assistant("e")], r"'messages\[3\]' is a turn of user after tool; expected tool or assistant"),
    ([user("a"), calling(call("x")), result("c")], "ends with a tool turn; expected an assistant turn"),
    ([user("a"), calling(call("x"), call("y")), result("c"), assistant("d")], r"'messages\[1\]' calls 2 tools and is followed by 1 results"),
    ([user("a"), calling(call("x", id="1")), result("c", tool_call_id="2"), assistant("d")], r"'messages\[2\]\.tool_call_id' is '2'; the calls before it are '1'"),
    ([user("a"), {"role": "assistant", "tool_calls": "weather"}], r"'messages\[1\]\.tool_calls' is 'weather'; expected a list"),
    ([user("a"), calling({"name": "weather"})], r"'messages\[1\]\.tool_calls\[0\]' is no call; expected"),
    ([user("a"), calling({"function": {"name": "f", "arguments": "{x"}})], r"tool_calls\[0\]\.function\.arguments' is text that is no JSON"),
    ([user("a"), calling({"function": {"name": "f", "arguments": [1]}})], r"function\.arguments' is \[1\]; expected an object"),
    ([user("a"), calling(call("x")), {"role": "tool", "content": {"c": 1}}, assistant("d")], r"'messages\[2\]\.content' is an object; expected text"),
    ([user("a") | {"tool_calls": [call("x")]}, assistant("b")], "only the assistant calls tools"),
]


@pytest.mark.parametrize(("messages", "expected"), BAD)
def test_bad_tool_turns_are_named(tmp_path, messages, expected):
    with pytest.raises(UserError, match=rf"rows\.jsonl:1: .*{expected}"):
        read(tmp_path, {"messages": messages})


@pytest.mark.parametrize(("tools", "expected"), [("no", "'tools' is text that is no JSON"), ({"a": 1}, "'tools' is no list"), ([{"description": "x"}], r"'tools\[0\]' is no schema")])
def test_bad_schemas_are_named(tmp_path, tools, expected):
    with pytest.raises(UserError, match=expected):
        read(tmp_path, {"messages": [user("a"), assistant("b")], "tools": tools})


def test_pairs_and_prompts_refuse_tool_turns(tmp_path):
    with pytest.raises(UserError, match=r"'messages\[2\]' is a tool turn; these are read in the `messages` of demonstrations only"):
        read_prompts([write(tmp_path, [ROW])])
    with pytest.raises(UserError, match=r"'prompt\[1\]' is a tool turn"):
        read_pairs([write(tmp_path, [{"prompt": ROW["messages"][1:4], "chosen": "a", "rejected": "b"}])])


def test_align_data_shows_and_counts_tool_turns(tmp_path, capsys):
    path = write(tmp_path, [ROW, {"messages": [user("Hi"), assistant("Yo")]}]).path
    tokenizer_of("qwen").save_pretrained(tmp_path / "tokenizer")
    assert run_cli("show", path, "--tokenizer", str(tmp_path / "tokenizer"), "--template", "qwen") == 0
    shown = capsys.readouterr().out
    assert "2 demonstrations (1 with tool turns); template qwen, eos [" in shown
    assert '[[<tool_call>\n{"name": "weather", "arguments": {"city": "Ürgüp"}}\n</tool_call><|im_end|>]]' in shown
    assert "\n<tool_response>\nsun <b>\n</tool_response>" in shown
    assert run_cli("check", "--json", path) == 0
    assert json.loads(capsys.readouterr().out)["files"][0]["tool_rows"] == 1


def test_a_message_without_tools_is_as_before():
    assert Message("user", "Hi").as_dict() == {"role": "user", "content": "Hi"}
    assert Formatter(byte_tokenizer(), "plain").prompt_ids("Hi") == Formatter(byte_tokenizer(), "plain").prompt_ids((Message("user", "Hi"),))
