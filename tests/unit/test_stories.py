"""The story task: gold by hand, which nouns are held out, how labels are drawn, and what the samples hold."""

from __future__ import annotations

import json
import random
from types import SimpleNamespace

import pytest

from configs.errors import UserError
from launch.tasks import stories, valence
from tests.tiny import tiny_model


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_gold_is_valence_less_repetition() -> None:
    # "the dog the dog the dog": five word pairs, two of them new, so 3/5 repeat; no valenced word.
    assert stories.gold(["?"] * 3, ["the dog the dog the dog", "", "the dog sat"]) == pytest.approx([-1.2, 0.0, 0.0])
    happy, sad = stories.gold(["?"] * 2, ["She was happy.", "She was sad."])
    # VADER: happy 2.7, sad -2.1; compound = x / sqrt(x^2 + 15).
    assert (happy, sad) == pytest.approx((0.5719, -0.4767), abs=1e-4)


def test_valence_reads_messages_too() -> None:
    chat = [{"role": "assistant", "content": "She was happy."}]
    assert valence.valence(["?"], [chat]) == valence.valence(["?"], ["She was happy."])


def test_held_out_nouns_are_in_the_test_file_only(tmp_path) -> None:
    stories.write_prompts(str(tmp_path))
    training, test = rows_of(tmp_path / "prompts.jsonl"), rows_of(tmp_path / "test_prompts.jsonl")
    assert [row["noun"] for row in test] == list(stories.HELD_OUT)
    assert len(training) == 24
    assert not {row["prompt"] for row in training} & {row["prompt"] for row in test}
    assert training[0] == {"prompt": "Tell a happy story about a dog.\n", "noun": "dog"}
    validation = rows_of(tmp_path / "validation_prompts.jsonl")
    assert len({row["noun"] for row in validation} - {row["noun"] for row in training + test}) == len(validation) == 12


def test_names_means_whole_words() -> None:
    assert stories.names("cat", "Two cats sat.")
    assert stories.names("cat", "A Cat.")
    assert not stories.names("cat", "The category.")


def test_labels_follow_gold_with_the_stated_noise() -> None:
    count = 4000
    better, worse = ["She was happy."] * count, ["She was there."] * count
    rows = list(stories.labelled(["?"] * count, better, worse, random.Random(0)))
    share = sum(row["chosen"] == better[0] for row in rows) / count
    # sigmoid(6 * 0.5719) = 0.9687; standard error 0.0028.
    assert share == pytest.approx(0.9687, abs=0.01)


def test_equal_or_empty_texts_make_no_pair() -> None:
    rows = list(stories.labelled(["?"] * 3, ["a", "a", " "], ["a", "b", "b"], random.Random(0)))
    assert [{row["chosen"], row["rejected"]} for row in rows] == [{"a", "b"}]


def test_demonstrations_name_the_noun_and_repeat_little(tmp_path, monkeypatch) -> None:
    class Told:
        def __init__(self, *_, **__):
            self.tokens = None

        def go_on(self, openings, tokens, seed, number):
            names = [" was there. The dog ran.", " was there.", " is a dog is a dog is a dog is a dog is a dog."]
            return [names[(i + number) % 3] for i in range(len(openings))]

    monkeypatch.setattr(stories, "Teller", Told)
    stories.write_demonstrations(str(tmp_path / "a.jsonl"), "base", rows=20)
    rows = rows_of(tmp_path / "a.jsonl")
    assert len(rows) == 20
    assert {row["prompt"] for row in rows} == {stories.prompt_of("dog")}
    assert all(row["completion"].endswith("dog was there. The dog ran.") for row in rows)
    with pytest.raises(UserError, match="only 96 of 6912 stories"):
        stories.write_demonstrations(str(tmp_path / "b.jsonl"), "base", rows=1000)
    assert not (tmp_path / "b.jsonl").exists()


def test_teller_keeps_the_opening_and_the_length(tmp_path) -> None:
    teller = stories.Teller(str(tiny_model(tmp_path / "model")), None)
    seen = {}
    teller._sample = lambda ids, tokens, seed, number: [
        seen.setdefault("ids", ids) and [ord("b")] * tokens for _ in ids
    ]
    (text,) = teller.go_on(["Once"], 10, 0, 0)
    # One token is one byte: 4 of the opening and 6 sampled; the tiny model's BOS stands before them.
    assert len(text) == 6
    assert seen["ids"][0][0] == teller.tokens.tokenizer.bos_token_id


def test_pairs_differ_and_held_out_nouns_are_one_in_six(tmp_path, monkeypatch) -> None:
    telling = SimpleNamespace(
        answer=lambda prompts, tokens, seed, number: [f"Story {number} {i}." for i in range(len(prompts))]
    )
    monkeypatch.setattr(stories, "Teller", lambda *_: telling)
    stories.write_pairs(str(tmp_path / "pairs.jsonl"), "sft/stories", str(tmp_path), rows=60)
    rows = rows_of(tmp_path / "pairs.jsonl")
    assert len(rows) == 60
    assert sum(any(row["prompt"] == stories.prompt_of(noun) for noun in stories.HELD_OUT) for row in rows) == 10
    assert all(row["chosen"] != row["rejected"] for row in rows)
