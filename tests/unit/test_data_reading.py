"""Reading: every layout gives the same rows, and every kind of bad row gives one clear error."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from configs.errors import UserError
from configs.schema.common import Source
from stages.data import Demonstration, Message, fingerprint, read_demonstrations, read_pairs, read_prompts


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def write(folder: Path, rows: list[Any], name: str = "rows.jsonl") -> Source:
    path = folder / name
    path.write_text("\n".join(json.dumps(row) for row in rows) if name.endswith(".jsonl") else json.dumps(rows))
    return Source(path=str(path))


HELLO = (Message("user", "Hi?"), Message("assistant", "Hello."))
DEMONSTRATIONS = {
    "messages": {"messages": [user("Hi?"), assistant("Hello.")]},
    "prompt_completion": {"prompt": "Hi?", "completion": "Hello."},
    "prompt_completion as messages": {"prompt": [user("Hi?")], "completion": [assistant("Hello.")]},
    "alpaca": {"instruction": "Hi?", "input": "", "output": "Hello."},
    "alpaca without input": {"instruction": "Hi?", "input": None, "output": "Hello."},
    "sharegpt": {"conversations": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Hello."}]},
    "sharegpt empty system": {"system": "", "conversations": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Hello."}]},
}


@pytest.mark.parametrize("layout", DEMONSTRATIONS)
def test_every_layout_of_a_demonstration_reads_the_same(tmp_path, layout):
    source = write(tmp_path, [DEMONSTRATIONS[layout]])
    loaded = read_demonstrations([source])
    assert loaded.rows == [Demonstration(HELLO, f"{tmp_path}/rows.jsonl:1")]
    assert loaded.report.sources[0]["format"] == layout.split()[0]
    assert read_prompts([source]).rows[0].prompt == HELLO[:1]


PROMPT = (Message("user", "Hi?"),)
PAIRS = {
    "explicit text": {"prompt": "Hi?", "chosen": "Hello.", "rejected": "What."},
    "explicit messages": {"prompt": [user("Hi?")], "chosen": [assistant("Hello.")], "rejected": [assistant("What.")]},
    "explicit, repeated": {
        "prompt": "Hi?", "chosen": [user("Hi?"), assistant("Hello.")], "rejected": [user("Hi?"), assistant("What.")],
    },
    "implicit": {"chosen": [user("Hi?"), assistant("Hello.")], "rejected": [user("Hi?"), assistant("What.")]},
    "sharegpt": {
        "conversations": [{"from": "human", "value": "Hi?"}],
        "chosen": {"from": "gpt", "value": "Hello."}, "rejected": {"from": "gpt", "value": "What."},
    },
    "alpaca": {"instruction": "Hi?", "input": "", "output": "x", "chosen": "Hello.", "rejected": "What."},
    "hh": {"chosen": "\n\nHuman: Hi?\n\nAssistant: Hello.", "rejected": "\n\nHuman: Hi?\n\nAssistant: What."},
}  # fmt: skip


@pytest.mark.parametrize("layout", PAIRS)
def test_every_layout_of_a_pair_reads_the_same(tmp_path, layout):
    (pair,) = read_pairs([write(tmp_path, [PAIRS[layout]])]).rows
    assert (pair.prompt, pair.chosen, pair.rejected, pair.margin) == (PROMPT, "Hello.", "What.", None)
    assert read_prompts([write(tmp_path, [PAIRS[layout]])]).rows[0].prompt == PROMPT


def test_hh_text_is_cut_at_its_last_assistant_turn(tmp_path):
    start = "\n\nHuman: A\n\nAssistant: B\n\nHuman: C\n\nAssistant:"
    (pair,) = read_pairs([write(tmp_path, [{"chosen": start + " D", "rejected": start + " E"}])]).rows
    assert [m.content for m in pair.prompt] == ["A", "B", "C"]
    assert (pair.chosen, pair.rejected) == ("D", "E")


def test_alpaca_input_follows_the_instruction_after_a_blank_line(tmp_path):
    (row,) = read_demonstrations([write(tmp_path, [{"instruction": "Sum.", "input": "1 2", "output": "3"}])]).rows
    assert row.messages[0].content == "Sum.\n\n1 2"


def test_pairs_are_demonstrations_only_when_asked(tmp_path):
    source = write(tmp_path, [PAIRS["implicit"]])
    with pytest.raises(UserError, match=r"rows\.jsonl:1: these are preference pairs .*format: preference"):
        read_demonstrations([source])
    (row,) = read_demonstrations([source.model_copy(update={"format": "preference"})]).rows
    assert row.messages == HELLO


def test_file_types_agree(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [{"prompt": f"question {i}", "completion": f"answer, {i}\nin two lines"} for i in range(3)]
    write(tmp_path, rows)
    write(tmp_path, rows, "rows.json")
    (tmp_path / "rows.csv").write_text("prompt,completion\n" + "".join(f'{r["prompt"]},"{r["completion"]}"\n' for r in rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    with gzip.open(tmp_path / "rows.jsonl.gz", "wt") as stream:
        stream.write("\n\n".join(map(json.dumps, rows)))
    loaded = {p.name: read_demonstrations([Source(path=str(p))]).rows for p in tmp_path.iterdir()}
    assert len(loaded) == 5
    assert len({fingerprint(found) for found in loaded.values()}) == 1
    assert [r.where.rpartition(":")[2] for r in loaded["rows.csv"]] == ["2", "4", "6"]
    assert [r.where.rpartition(":")[2] for r in loaded["rows.jsonl.gz"]] == ["1", "3", "5"]
    assert [r.where.rpartition(":")[2] for r in loaded["rows.parquet"]] == ["0", "1", "2"]


def test_one_object_in_a_json_file_is_one_row(tmp_path):
    (tmp_path / "one.json").write_text(json.dumps(DEMONSTRATIONS["sharegpt"]))
    assert read_demonstrations([Source(path=str(tmp_path / "one.json"))]).rows[0].messages == HELLO


def test_parquet_holds_message_lists(tmp_path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([DEMONSTRATIONS["messages"]]), tmp_path / "m.parquet")
    assert read_demonstrations([Source(path=str(tmp_path / "m.parquet"))]).rows[0].messages == HELLO


def test_prompts_keep_scalar_columns_for_scorers(tmp_path):
    source = write(tmp_path, [{"prompt": "Hi?", "order": 7, "item": "lamp", "tags": ["a"], "completions": "x"}])
    loaded = read_prompts([source])
    assert loaded.rows[0].columns == {"order": 7, "item": "lamp"}
    assert "completions" in loaded.report.warnings[0]
    (tmp_path / "p.txt").write_text("one\n\ntwo\n")
    assert [(r.prompt[0].content, r.where[-2:]) for r in read_prompts([Source(path=str(tmp_path / "p.txt"))]).rows] == [("one", ":1"), ("two", ":3")]
    (tmp_path / "t.csv").write_text("text,category\nWhere is it?,arrival\n")
    assert read_prompts([Source(path=str(tmp_path / "t.csv"))]).rows[0].columns == {"category": "arrival"}


def test_columns_limit_and_several_sources(tmp_path):
    first = write(tmp_path, [{"question": f"q{i}", "reply": "r"} for i in range(9)], "a.jsonl")
    first = first.model_copy(update={"columns": {"prompt": "question", "completion": "reply"}, "limit": 2, "weight": 3.0})
    rows = read_demonstrations([first, write(tmp_path, [DEMONSTRATIONS["alpaca"]], "b.json")]).rows
    assert [row.messages[0].content for row in rows] == ["q0", "q1", "Hi?"]
    assert [row.weight for row in rows] == [3.0, 3.0, 1.0]
    with pytest.raises(UserError, match=r"maps from 'query'.*'question', 'reply'"):
        read_demonstrations([first.model_copy(update={"columns": {"prompt": "query"}})])
    with pytest.raises(UserError, match=r"'promt'.*did you mean 'prompt'"):
        read_demonstrations([first.model_copy(update={"columns": {"promt": "question"}})])


BAD_DEMONSTRATIONS = [
    ({"prompt": "", "completion": "x"}, "'prompt' is empty"),
    ({"prompt": "x", "completion": " \n"}, "'completion' is empty"),
    ({"prompt": "x"}, "'completion' is missing"),
    ({"prompt": 3, "completion": "x"}, "'prompt' is 3; expected text"),
    ({"prompt": "x", "completion": None}, "'completion' is null"),
    ({"prompt": "x", "completion": [user("y")]}, "turn of user; expected assistant"),
    ([1], "must be an object"),
]
BAD_MESSAGES = [
    ([user("a"), user("b"), assistant("c")], r"'messages\[1\]' is a turn of user after user; expected assistant"),
    ([assistant("a"), user("b")], r"'messages\[0\]' is a turn of assistant at the beginning"),
    ([user("a")], "no assistant turn"),
    ([user("a"), assistant("b"), user("c")], "ends with a user turn"),
    ([user("a"), {"role": "tool", "content": "b"}], r"'messages\[1\]' is a turn of tool after user; expected assistant"),
    ([user("a"), {"role": "assistant", "content": ""}], r"'messages\[1\]\.content' is empty"),
    ([user("a"), {"role": "assistant"}], r"'messages\[1\]\.content' is missing"),
    ([user("a"), "b"], r"'messages\[1\]' is text"),
    ([], "has no turns"),
    ("a", "'messages' is text; expected a list"),
]


@pytest.mark.parametrize(("row", "expected"), BAD_DEMONSTRATIONS + [({"messages": m}, e) for m, e in BAD_MESSAGES])
def test_a_bad_demonstration_is_named_by_file_line_and_field(tmp_path, row, expected):
    good = {"messages": DEMONSTRATIONS["messages"]["messages"]} if isinstance(row, dict) and "messages" in row else {"prompt": "a", "completion": "b"}
    with pytest.raises(UserError, match=rf"(?s)1 bad row .*rows\.jsonl:2: .*{expected}"):
        read_demonstrations([write(tmp_path, [good, row])])


BAD_PAIRS = [
    ({"prompt": "x", "chosen": "a"}, "'rejected' is missing"),
    ({"prompt": "x", "chosen": "a", "rejected": ""}, "'rejected' is empty"),
    ({"prompt": "x", "chosen": "a", "rejected": "b", "margin": "big"}, "'margin' is 'big'"),
    ({"prompt": "x", "chosen": "a", "rejected": [user("z"), assistant("b")]}, "does not begin with the row's prompt"),
    ({"prompt": [user("x"), assistant("y")], "chosen": "a", "rejected": "b"}, "a prompt ends with a user turn"),
]


@pytest.mark.parametrize(("row", "expected"), BAD_PAIRS)
def test_a_bad_pair_is_named_by_file_line_and_field(tmp_path, row, expected):
    with pytest.raises(UserError, match=rf"(?s)rows\.jsonl:2: .*{expected}"):
        read_pairs([write(tmp_path, [PAIRS["explicit text"], row])])


def test_implicit_prompts_must_agree(tmp_path):
    row = {"chosen": [user("Hi?"), assistant("a")], "rejected": [user("Ho?"), assistant("b")]}
    with pytest.raises(UserError, match="differs from 'chosen' already at turn 0"):
        read_pairs([write(tmp_path, [row])])


def test_all_bad_rows_come_as_one_error_with_the_first_five(tmp_path):
    rows = [{"prompt": "a", "completion": "b"}] + [{"prompt": "", "completion": "b"}] * 7
    with pytest.raises(UserError) as error:
        read_demonstrations([write(tmp_path, rows), write(tmp_path, rows, "more.json")])
    text = str(error.value)
    assert text.startswith("14 bad rows in demonstrations")
    assert text.count("rows.jsonl:") == 5
    assert "… and 9 more" in text


def test_broken_files(tmp_path):
    def fails(name: str, content: str | bytes, match: str) -> None:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(UserError, match=match):
            read_demonstrations([Source(path=str(path))])

    good = json.dumps(DEMONSTRATIONS["messages"])
    fails("a.jsonl", f'{good}\n\n{{"messages": \n', r"a\.jsonl:3: broken JSON")
    fails("b.json", f"[{good},\n{good}\n{good}]", r"b\.json:3: broken JSON")
    fails("c.json", f"{good}\n{good}", r"c\.json:2: broken JSON.*suffix \.jsonl")
    fails("d.json", "3", "expected a list of objects")
    fails("e.jsonl", "", "holds no rows")
    fails("f.jsonl", b'{"prompt": "\xff"}', "not UTF-8")
    fails("g.csv", "prompt,completion\na\n", r"g\.csv:2: the number of cells")
    fails("h.parquet", b"nothing", "not a readable parquet")
    fails("i.xlsx", b"nothing", "cannot tell how to read '.xlsx'")
    fails("j.jsonl.gz", b"nothing", "not a whole gzip")
    with pytest.raises(UserError, match=r"no such file; did you mean a\.jsonl"):
        read_demonstrations([Source(path=str(tmp_path / "aa.jsonl"))])
    with pytest.raises(UserError, match="is a folder"):
        read_demonstrations([Source(path=str(tmp_path))])


def test_a_dataset_that_cannot_be_loaded_says_what_to_do(monkeypatch):
    import datasets

    def offline(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("Couldn't reach 'nobody/nothing' on the Hub (offline mode)")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(UserError, match=r"hf:nobody/nothing: split 'train'.*offline mode.*save it as \.jsonl"):
        read_pairs([Source(path="hf:nobody/nothing")])


def test_a_dataset_is_read_by_name(monkeypatch):
    import datasets

    asked = []

    def load(name: str, **options: Any) -> Any:
        asked.append((name, options))
        return datasets.Dataset.from_list([PAIRS["implicit"]])

    monkeypatch.setattr(datasets, "load_dataset", load)
    (pair,) = read_pairs([Source(path="hf:some/pairs", hf_split="test", revision="abc")]).rows
    assert (pair.chosen, pair.where) == ("Hello.", "hf:some/pairs:0")
    assert asked == [("some/pairs", {"split": "test", "revision": "abc"})]


UNCLEAR = {
    "dialogue logs": ({"convo_id": 1, "original": [["agent", "Hi"]]}, "columns convo_id, original"),
    "message tree": ({"message_id": "a", "parent_message_id": None, "text": "Hi", "role": "prompter"}, "message tree"),
    "labelled comparison": ({"input": "a", "output_1": "b", "output_2": "c", "label": 1}, "labelled comparison"),
    "kto": ({"messages": [user("a"), assistant("b")], "label": False}, "true/false label"),
    "dolly": ({"instruction": "a", "context": "", "response": "b"}, r"perhaps \{input: context, output: response\}"),
}


@pytest.mark.parametrize("layout", UNCLEAR)
def test_what_is_not_supported_is_an_error_not_nonsense(tmp_path, layout):
    row, expected = UNCLEAR[layout]
    with pytest.raises(UserError, match=expected):
        read_demonstrations([write(tmp_path, [row])])
    with pytest.raises(UserError):
        read_pairs([write(tmp_path, [row])])


def test_plain_text_pairs_without_a_prompt_are_unclear(tmp_path):
    with pytest.raises(UserError, match="cannot recognise pairs from the columns chosen, rejected"):
        read_pairs([write(tmp_path, [{"chosen": "a", "rejected": "b"}])])


def test_equal_pairs_are_dropped_and_counted_and_all_equal_is_an_error(tmp_path):
    equal = {"prompt": "x", "chosen": "same", "rejected": "same "}
    loaded = read_pairs([write(tmp_path, [PAIRS["explicit text"], equal, equal])])
    assert (len(loaded.rows), loaded.report.equal_pairs, loaded.report.rows) == (1, 2, 1)
    with pytest.raises(UserError, match=r"rows\.jsonl:1: chosen equals rejected in all 2 pairs"):
        read_pairs([write(tmp_path, [equal, equal])])


def test_duplicates_and_placeholders_are_counted(tmp_path):
    rows = [{"prompt": "x", "completion": "I am {{name}}."}, {"prompt": "x", "completion": "y"}, {"prompt": "x", "completion": "y"}]
    report = read_demonstrations([write(tmp_path, rows)]).report
    assert (report.rows, report.duplicates, report.placeholders) == (3, 1, 1)
    assert any("{{name}}" in warning for warning in report.warnings)


def test_margin_is_read(tmp_path):
    rows = [PAIRS["explicit text"] | {"margin": 1.5}, PAIRS["explicit text"] | {"margin": None}]
    assert [pair.margin for pair in read_pairs([write(tmp_path, rows)]).rows] == [1.5, None]
