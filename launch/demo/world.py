"""The demo's world: customer messages, good and bad answers, noisy preferences, and the gold rubric.

A customer names an order number, an item and a problem. An agent's answer is good when it names that item and that order,
offers the remedy of that problem, is polite, and is concise. `gold` measures exactly this from the text. No stage trains on
gold; the preference labels are drawn from a Bradley-Terry model on the difference in gold, so some of them are wrong.
"""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.demo import wording as w
from launch.jsonl import write_jsonl
from rewards.protocol import text_of

ORDER_KEY = r"\b[A-Z]\d+\b"
WEIGHTS = {"order": 0.2, "item": 0.2, "remedy": 0.25, "polite": 0.2, "concise": 0.15}
CONCISE_WORDS = 28  # no answer without rambling is longer
LABEL_SLOPE = 13.0  # P(a preferred to b) = sigmoid(LABEL_SLOPE * (gold(a) - gold(b))); one label in eight is wrong


@dataclass(frozen=True)
class Case:
    """A customer's case and the message that describes it."""

    order: str
    item: str
    problem: str
    message: str

    def columns(self) -> dict[str, str]:
        """What a prompts file carries beside the prompt."""
        return {"order": self.order, "item": self.item, "problem": self.problem}


@dataclass(frozen=True)
class Way:
    """A way to answer. order, item, remedy: right, wrong or absent."""

    order: str
    item: str
    remedy: str
    tone: str  # polite, plain or curt
    rambling: bool


GOOD = Way("right", "right", "right", "polite", False)


def draw_order(rng: random.Random) -> str:
    """An order number such as K47: one letter and two digits."""
    return f"{rng.choice(w.LETTERS)}{rng.randrange(10, 100)}"


def draw_case(rng: random.Random) -> Case:
    """A random case."""
    order = draw_order(rng)
    item, problem = rng.choice(w.ITEMS), rng.choice(list(w.PROBLEMS))
    complaint = rng.choice(w.PROBLEMS[problem].complaints).format(item=item)
    place = rng.choice(w.PLACES).format(order=order)
    parts = (rng.choice(w.GREETINGS), f"{place} {complaint}.", rng.choice(w.CLOSINGS))
    return Case(order, item, problem, " ".join(part for part in parts if part))


def draw_cases(rng: random.Random, count: int) -> list[Case]:
    """`count` cases of which no two have the same message."""
    cases: dict[str, Case] = {}
    while len(cases) < count:
        case = draw_case(rng)
        cases.setdefault(case.message, case)
    return list(cases.values())


def draw_way(rng: random.Random, quality: float, naming: float | None = None, wrong: float = 0.15) -> Way:
    """A random way to answer, each part of it right with probability `quality`, independently of the others.

    `naming` is the probability for order and item, where it differs; of the parts that are not right, a share `wrong` is wrong
    and the rest are absent.
    """

    def part(share: float) -> str:
        if rng.random() < share:
            return "right"
        return "wrong" if rng.random() < wrong else "absent"

    naming = quality if naming is None else naming
    tone = "polite" if rng.random() < quality else rng.choice(("plain", "curt"))
    return Way(part(naming), part(naming), part(quality), tone, rng.random() >= quality)


def answer(case: Case, way: Way, rng: random.Random) -> str:
    """The text of an answer to `case`, given in this way."""
    order = case.order if way.order == "right" else draw_order(rng)
    item = case.item if way.item == "right" else rng.choice([i for i in w.ITEMS if i != case.item])
    forms = {
        (True, True): w.BOTH,
        (True, False): w.ORDER_ONLY,
        (False, True): w.ITEM_ONLY,
        (False, False): w.NEITHER,
    }[way.order != "absent", way.item != "absent"]
    parts = [rng.choice(forms).format(order=order, item=item)]
    if way.remedy == "absent":
        parts.append(rng.choice(w.NO_REMEDY))
    else:
        problem = case.problem if way.remedy == "right" else rng.choice([p for p in w.PROBLEMS if p != case.problem])
        parts.append(rng.choice(w.PROBLEMS[problem].remedies))
    if way.rambling:
        for sentence in rng.sample(w.RAMBLING, 2):
            parts.insert(rng.randint(0, len(parts)), sentence)
    openings, closings = {
        "polite": (w.POLITE_OPENINGS, w.POLITE_CLOSINGS),
        "curt": (w.CURT_OPENINGS, w.CURT_CLOSINGS),
        "plain": (w.PLAIN_OPENINGS, ("",)),
    }[way.tone]
    return " ".join(part for part in (rng.choice(openings), *parts, rng.choice(closings)) if part)


# ---- gold


def read_message(message: str) -> dict[str, str]:
    """The order, item and problem that a customer's message names; what it does not name is absent from the result."""
    found = {}
    if order := re.search(ORDER_KEY, message):
        found["order"] = order[0]
    items = named_items(message)
    if len(items) == 1:
        found["item"] = items.pop()
    for problem, texts in w.PROBLEMS.items():
        patterns = (re.escape(text).replace(r"\{item\}", r"\w+") for text in texts.complaints)
        if any(re.search(pattern, message, re.IGNORECASE) for pattern in patterns):
            found["problem"] = problem
    return found


def named_items(text: str) -> set[str]:
    """The items that occur in the text as whole words."""
    return set(re.findall(r"[a-z]+", text.lower())) & set(w.ITEMS)


def rubric(case: dict[str, str], completion: str) -> dict[str, float]:
    """The five parts of the gold rubric, each in [0, 1].

    order, item: 1 when the right one and no other is named, 0.3 when none is, 0 otherwise. remedy: 1 when the right one and no
    other is offered, 0.5 with others beside it, else 0. polite: 1 with a courtesy and no rudeness, 0.5 with neither, else 0.
    concise: 1 up to CONCISE_WORDS words, falling to 0 at one and a half times as many, times the share of word pairs that do not repeat.
    """
    orders, items = set(re.findall(ORDER_KEY, completion)), named_items(completion)
    offered = {
        name for name, problem in w.PROBLEMS.items() if re.search(rf"\b{problem.key}\b", completion, re.IGNORECASE)
    }
    right = case.get("problem") in offered
    rude, courteous = (bool(re.search(key, completion, re.IGNORECASE)) for key in (w.CURT_KEY, w.POLITE_KEY))
    words = completion.split()
    pairs = list(itertools.pairwise(words))
    fresh = len(set(pairs)) / len(pairs) if pairs else 1.0
    return {
        "order": _named(case.get("order"), orders),
        "item": _named(case.get("item"), items),
        "remedy": (1.0 if len(offered) == 1 else 0.5) if right else 0.0,
        "polite": 0.0 if rude else 1.0 if courteous else 0.5,
        "concise": fresh * min(1.0, max(0.0, 3 - 2 * len(words) / CONCISE_WORDS)),
    }


def _named(wanted: str | None, found: set[str]) -> float:
    if not found:
        return 0.3
    return 1.0 if found == {wanted} else 0.0


def gold(prompts: Sequence[Any], completions: Sequence[Any], **columns: Sequence[Any]) -> list[float]:
    """The gold rubric, in [0, 1]: the weighted sum of `rubric`, 0 for an empty completion.

    prompts, completions: texts or lists of messages. The case is read from the columns order, item, problem where the prompts
    file has them, else from the customer's message.
    """
    scores = []
    for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        text = text_of(completion).strip()
        given = {
            key: str(columns[key][i]) for key in ("order", "item", "problem") if columns.get(key) and columns[key][i]
        }
        parts = rubric({**read_message(text_of(prompt)), **given}, text)
        scores.append(sum(WEIGHTS[name] * value for name, value in parts.items()) if text else 0.0)
    return scores


# ---- files


def demonstrations(rng: random.Random, cases: Iterable[Case], quality: float) -> Iterator[dict[str, str]]:
    """Rows of the demonstrations: answers of mixed quality."""
    for case in cases:
        yield {"prompt": case.message, "completion": answer(case, draw_way(rng, quality), rng)}


def preferences(rng: random.Random, cases: Iterable[Case], quality: float) -> Iterator[dict[str, str]]:
    """Rows of the preference pairs: two answers of differing ways, the label drawn from their difference in gold."""
    for case in cases:
        first = second = answer(case, draw_way(rng, quality, wrong=0.2), rng)
        while second == first:
            second = answer(case, draw_way(rng, quality, wrong=0.2), rng)
        a, b = gold([case.message] * 2, [first, second], **{k: [v] * 2 for k, v in case.columns().items()})
        if rng.random() >= 1 / (1 + math.exp(-LABEL_SLOPE * (a - b))):
            first, second = second, first
        yield {"prompt": case.message, "chosen": first, "rejected": second}


def write_data(
    output: str, seed: int = 0, demonstrations_rows: int = 400, pairs_rows: int = 5000, prompts_rows: int = 6000,
    demonstration_quality: float = 0.5, pair_quality: float = 0.5,
) -> None:  # fmt: skip
    """Write demonstrations.jsonl, pairs.jsonl and prompts.jsonl into the folder `output`.

    No two rows of all three files have the same prompt. Which prompts are kept for the evaluation is for the chain's split
    to say. The same arguments write the same bytes.
    """
    rng = random.Random(f"world {seed}")
    cases = draw_cases(rng, demonstrations_rows + pairs_rows + prompts_rows)
    shown, compared = cases[:demonstrations_rows], cases[demonstrations_rows : demonstrations_rows + pairs_rows]
    folder = Path(output)
    write_jsonl(folder / "demonstrations.jsonl", demonstrations(rng, shown, demonstration_quality))
    write_jsonl(folder / "pairs.jsonl", preferences(rng, compared, pair_quality))
    rest = cases[demonstrations_rows + pairs_rows :]
    write_jsonl(folder / "prompts.jsonl", ({"prompt": case.message, **case.columns()} for case in rest))
