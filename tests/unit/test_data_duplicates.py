"""Validation rows found among the training rows: word for word, nearly, and not at all."""

from __future__ import annotations

from stages.data import Demonstration, Message, duplicates

TEXT = "The little dog ran to the park and found a red ball under the old oak tree near the pond where ducks swim all day long in the sun"


def row(prompt, answer):
    return Demonstration((Message("user", prompt), Message("assistant", answer)))


def test_exact_rows_are_found_whatever_their_case_and_punctuation():
    found = duplicates.find([row("Say it!", "Yes, a ball.")], [row("say  it", "yes a Ball"), row("say it", "no ball")])
    assert found.exact == [0]


def test_near_rows_are_found_by_their_shingles():
    """28 words with the prompt's; one added at the end changes one shingle of 29 - 2 = 27: similarity 26 / 27."""
    train = [row("Tell:", TEXT)]
    one, other = duplicates.shingles(train[0]), duplicates.shingles(row("Tell:", TEXT + " again"))
    assert duplicates.similarity(one, other) == len(one) / (len(one) + 1) >= 0.9
    validation = [row("Tell:", TEXT + " again"), row("Tell:", TEXT.replace("dog", "cat").replace("ball", "kite").replace("ducks", "geese"))]
    assert duplicates.find(train, validation) == duplicates.Duplicates([], [0])


def test_rows_of_one_kind_with_other_words_in_them_are_not_the_same():
    train = [row(f"My order {i} of a mug arrived broken", f"I am sorry that the mug of order {i} broke; a new one is on its way") for i in range(50)]
    validation = [row(f"My order {i} of a mug arrived broken", f"I am sorry that the mug of order {i} broke; a new one is on its way") for i in range(50, 60)]
    assert duplicates.find(train, validation) == duplicates.Duplicates([], [])


def test_without_datasketch_exact_rows_are_found_and_near_ones_are_said_not_to_be_looked_for(monkeypatch):
    monkeypatch.setattr(duplicates, "find_spec", lambda name: None)
    assert duplicates.find([row("a", "b c d")], [row("a", "B, c d!")]) == duplicates.Duplicates([0], None)
