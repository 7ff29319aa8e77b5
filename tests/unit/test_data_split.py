"""Splits: by prompt group, alike in every file and stage; weights touch training rows only."""

from __future__ import annotations

import json

import pytest

from configs.errors import UserError
from configs.schema.common import Source, Split
from stages.data import (
    Demonstration,
    Message,
    PreferencePair,
    Prompt,
    Splitter,
    as_messages,
    fingerprint,
    group_key,
    read_demonstrations,
)


def demonstration(prompt: str, answer: str = "yes", weight: float = 1.0, where: str = "a.jsonl:1") -> Demonstration:
    return Demonstration((Message("user", prompt), Message("assistant", answer)), where, weight)


def test_group_key_ignores_case_space_width_and_system():
    assert group_key("  Where IS\n my ｏｒｄｅｒ? ") == "where is my order?"
    assert group_key((Message("system", "Be kind."), Message("user", "A b"), Message("assistant", "c"), Message("user", "d"))) == "a b"


def test_one_prompt_falls_to_one_part_whatever_the_kind_of_row():
    splitter = Splitter(Split(seed=3, validation=0.3, test=0.3))
    for i in range(200):
        question = f"Question {i}"
        kinds = [
            demonstration(question.upper()),
            PreferencePair(as_messages(question + " "), "a", "b"),
            Prompt(as_messages(f" {question}")),
            Demonstration((Message("system", "s"), *demonstration(question).messages)),
        ]
        assert len({splitter.of(row) for row in kinds}) == 1


def test_the_split_is_fixed_for_good():
    """A change of the hash would move evaluation prompts into training for everyone who upgrades: these are pinned."""
    splitter = Splitter(Split(seed=0, validation=0.25, test=0.25))
    parts = "".join(splitter.of(demonstration(f"prompt {i}"))[1] for i in range(12))
    assert parts == "rrereeraeaee"


def test_shares_are_about_what_is_asked_and_seeds_differ():
    rows = [demonstration(f"prompt {i}") for i in range(2000)]
    splits = Splitter(Split(validation=0.1, test=0.2)).split(rows)
    assert splits.report["rows"] == {"train": len(splits.train), "validation": len(splits.validation), "test": len(splits.test)}
    assert abs(len(splits.test) - 400) < 4 * (2000 * 0.2 * 0.8) ** 0.5
    assert abs(len(splits.validation) - 200) < 4 * (2000 * 0.1 * 0.9) ** 0.5
    assert Splitter(Split(seed=1, validation=0.1, test=0.2)).split(rows).report["fingerprint"] != splits.report["fingerprint"]


def test_no_group_stands_on_both_sides():
    rows = [demonstration(f"prompt {i % 50}", answer=str(i)) for i in range(500)]
    splits = Splitter(Split(validation=0.2, test=0.2)).split(rows)
    groups = [{group_key(row.prompt) for row in part} for part in (splits.train, splits.validation, splits.test)]
    assert sum(map(len, groups)) == 50
    assert len(set.union(*groups)) == 50


def test_raising_the_test_share_never_moves_a_test_prompt_to_training():
    rows = [demonstration(f"prompt {i}") for i in range(300)]
    small, large = (Splitter(Split(validation=0, test=share)) for share in (0.1, 0.3))
    assert all(large.of(row) == "test" for row in rows if small.of(row) == "test")


def test_test_prompts_are_always_test(tmp_path):
    path = tmp_path / "held_out.txt"
    path.write_text("PROMPT 7\nprompt  8\n")
    splitter = Splitter(Split(validation=0, test=0, test_prompts=path))
    splits = splitter.split([demonstration(f"prompt {i}") for i in range(10)])
    assert [row.messages[0].content for row in splits.test] == ["prompt 7", "prompt 8"]
    assert len(splits.train) == 8
    assert splits.report["split"]["test_prompts"] == 2
    path.write_text("prompt 8\n prompt 7")  # the same prompts in another file
    assert Splitter(Split(validation=0, test=0, test_prompts=path)).facts() == splitter.facts()
    path.write_text("prompt 8\nprompt 6")
    assert Splitter(Split(validation=0, test=0, test_prompts=path)).facts() != splitter.facts()


def test_nothing_left_to_train_on_is_an_error(tmp_path):
    path = tmp_path / "held_out.txt"
    path.write_text("only\n")
    splitter = Splitter(Split(test_prompts=path))
    with pytest.raises(UserError, match="nothing is left to train on: 1 rows in 1 prompt groups"):
        splitter.split([demonstration("only")])
    assert len(splitter.split([demonstration("only")], need_train=False).test) == 1


def test_weights_apply_to_training_rows_after_the_split(tmp_path):
    sources = []
    for name, weight in (("a", 2.5), ("b", 0.5), ("c", 1.0)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join(json.dumps({"prompt": f"{name} {i}", "completion": "x"}) for i in range(100)))
        sources.append(Source(path=str(path), weight=weight))
    rows = read_demonstrations(sources).rows
    unweighted = [Demonstration(row.messages, row.where) for row in rows]
    config = Split(validation=0.2, test=0.2)
    splits, plain = Splitter(config).split(rows), Splitter(config).split(unweighted)

    def count(part, name):
        return sum(row.messages[0].content.startswith(name) for row in part)

    a, b, c = (count(plain.train, name) for name in "abc")
    assert [count(splits.train, name) for name in "abc"] == [2 * a + round(0.5 * a), round(0.5 * b), c]
    assert [r.messages for r in splits.test] == [r.messages for r in plain.test]
    assert [r.messages for r in splits.validation] == [r.messages for r in plain.validation]
    assert splits.report["fingerprint"]["test"] == plain.report["fingerprint"]["test"]
    again = Splitter(config).split(rows)
    assert fingerprint(again.train) == fingerprint(splits.train)
    tiny = [demonstration("a", weight=0.1)]
    with pytest.raises(UserError, match="weights of the sources leave none"):
        Splitter(Split(validation=0, test=0)).split(tiny)


def test_fingerprint_counts_content_and_order_not_place():
    a, b = demonstration("a"), demonstration("b")
    assert fingerprint([a, b]) == fingerprint([demonstration("a", where="elsewhere:9", weight=2.0), b])
    assert len({fingerprint(rows) for rows in ([a, b], [b, a], [a], [a, a], [], [demonstration("a", "no")])}) == 6
    # One long text never equals two short ones.
    assert fingerprint([Prompt(as_messages("x"), {"k": 1})]) != fingerprint([Prompt(as_messages("x"), {"k": "1"})])
