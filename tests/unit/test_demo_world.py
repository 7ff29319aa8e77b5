"""The demo's world: what the gold rubric counts, how noisy the labels are, and what no shortcut can guess."""

from __future__ import annotations

import json
import random
import re

import pytest

from launch.demo import wording, world

MESSAGE = "Hi. My order is K47 and the kettle is broken. Please help."
RIGHT = "I am sorry about that. I see the kettle in order K47. We will replace the broken one today."


def cases(count: int, seed: int = 3) -> list[world.Case]:
    return world.draw_cases(random.Random(seed), count)


def test_gold_by_hand() -> None:
    # Weights: order 0.2, item 0.2, remedy 0.25, polite 0.2, concise 0.15.
    answers = {
        RIGHT: 1.0,
        RIGHT.replace("K47", "K48"): 0.8,  # another order: order 0
        RIGHT.replace("in order K47", "in our system"): 0.86,  # no order: order 0.3
        RIGHT.replace("kettle", "lamp"): 0.8,
        RIGHT.replace("replace the broken one", "refund what was paid twice"): 0.75,
        RIGHT + " You get a return label.": 0.875,  # a second remedy: half
        RIGHT.replace("I am sorry about that. ", ""): 0.9,  # no courtesy: polite 0.5
        RIGHT + " Do not bother us.": 0.8,  # rude although courteous
        "": 0.0,
    }
    assert world.gold([MESSAGE] * len(answers), list(answers)) == pytest.approx(list(answers.values()))


def test_gold_counts_words_and_repetition() -> None:
    rambling = RIGHT + " one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
    # 19 + 14 = 33 words, 28 are free: concise = 3 - 2 * 33/28.
    assert len(rambling.split()) == 33
    assert world.gold([MESSAGE], [rambling]) == pytest.approx([0.85 + 0.15 * (3 - 2 * 33 / 28)])
    assert world.rubric({}, "so so so so so")["concise"] == pytest.approx(1 / 4)


def test_gold_reads_columns_before_the_message() -> None:
    columns = {"order": ["K48"], "item": ["kettle"], "problem": ["broken"]}
    assert world.gold([MESSAGE], [RIGHT], **columns) == pytest.approx([0.8])
    chat = [{"role": "user", "content": MESSAGE}]
    assert world.gold([chat], [[{"role": "assistant", "content": RIGHT}]]) == pytest.approx([1.0])


def test_every_message_is_read_back() -> None:
    for case in cases(1000):
        assert world.read_message(case.message) == case.columns()


def test_each_problem_has_its_word_and_no_other_text_has_it() -> None:
    others = [
        *wording.BOTH,
        *wording.ITEM_ONLY,
        *wording.ORDER_ONLY,
        *wording.NEITHER,
        *wording.NO_REMEDY,
        *wording.RAMBLING,
    ]
    others += [*wording.POLITE_OPENINGS, *wording.CURT_OPENINGS, *wording.PLAIN_OPENINGS, *wording.POLITE_CLOSINGS]
    others += [*wording.CURT_CLOSINGS, *wording.GREETINGS, *wording.PLACES, *wording.CLOSINGS]
    for name, problem in wording.PROBLEMS.items():
        assert not [text for text in others if re.search(rf"\b{problem.key}\b", text, re.IGNORECASE)]
        for other, theirs in wording.PROBLEMS.items():
            for sentence in (*theirs.remedies, *theirs.complaints):
                assert bool(re.search(rf"\b{problem.key}\b", sentence, re.IGNORECASE)) == (name == other), (
                    name,
                    sentence,
                )


def test_good_answers_get_full_gold_and_others_less() -> None:
    rng = random.Random(0)
    drawn = cases(300)
    best = world.gold([c.message for c in drawn], [world.answer(c, world.GOOD, rng) for c in drawn])
    assert min(best) > 0.96  # two sentences may share a pair of words
    mixed = world.gold([c.message for c in drawn], [world.answer(c, world.draw_way(rng, 0.5), rng) for c in drawn])
    assert 0.4 < sum(mixed) / len(mixed) < 0.7


def test_files_are_the_same_for_the_same_seed_and_share_no_prompt(tmp_path) -> None:
    sizes = {"demonstrations_rows": 60, "pairs_rows": 80, "prompts_rows": 100}
    for folder in ("a", "b"):
        world.write_data(str(tmp_path / folder), seed=5, **sizes)
    world.write_data(str(tmp_path / "c"), seed=6, **sizes)
    names = ("demonstrations.jsonl", "pairs.jsonl", "prompts.jsonl")
    assert [(tmp_path / "a" / n).read_bytes() for n in names] == [(tmp_path / "b" / n).read_bytes() for n in names]
    assert (tmp_path / "a" / names[0]).read_bytes() != (tmp_path / "c" / names[0]).read_bytes()
    prompts = [json.loads(line)["prompt"] for n in names for line in (tmp_path / "a" / n).read_text().splitlines()]
    assert len(prompts) == len(set(prompts)) == 240
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == sorted(names)


def test_labels_are_noisy_and_length_does_not_give_them_away() -> None:
    rng = random.Random(1)
    rows = list(world.preferences(rng, cases(3000), 0.5))
    prompts = [row["prompt"] for row in rows]
    chosen = world.gold(prompts, [row["chosen"] for row in rows])
    rejected = world.gold(prompts, [row["rejected"] for row in rows])
    flipped = sum(a < b for a, b in zip(chosen, rejected, strict=True)) / len(rows)
    assert 0.10 < flipped < 0.15
    longer = sum(len(row["chosen"]) > len(row["rejected"]) for row in rows) / len(rows)
    assert abs(longer - 0.5) < 0.05
