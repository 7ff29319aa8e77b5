"""The story task: a small pretrained story teller learns to tell happy stories, and gold is how happy and how varied they are.

Gold of a completion is its VADER compound valence, from -1 to 1, less twice the share of repeated word pairs. Demonstrations are
the base model's own stories; preference pairs are two samples of the SFT model, labelled with noise. Six nouns are kept out of all
training and are what the evaluation asks for.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from configs.errors import UserError
from configs.schema import Sampling
from launch.jsonl import write_jsonl
from launch.tasks.valence import valence
from rewards.protocol import text_of
from rewards.rules import repeated_share

NOUNS = (
    "dog", "cat", "bird", "ball", "tree", "car", "cake", "fish", "boat", "bear", "girl", "boy", "flower", "book", "hat",
    "duck", "frog", "box", "rock", "king", "bunny", "mouse", "star", "train", "doll", "bug", "lion", "apple", "bee", "cow",
)  # fmt: skip
HELD_OUT = ("frog", "train", "hat", "lion", "cake", "bug")
VALIDATION = ("rabbit", "horse", "house", "pig", "kite", "monkey", "shoe", "truck", "bike", "cup", "moon", "sheep")  # of no other file
SIZES = ("little ", "big ", "small ", "")
LABEL_SLOPE = 6.0  # P(a preferred to b) = sigmoid(LABEL_SLOPE * (gold(a) - gold(b)))
MOST_REPEATED = 0.1  # a demonstration repeats at most this share of its word pairs


def prompt_of(noun: str) -> str:
    """What the policy is asked, for the raw template."""
    return f"Tell a happy story about a {noun}.\n"


def names(noun: str, text: str) -> bool:
    """Whether the text names the noun, in the singular or with an s."""
    return re.search(rf"\b{noun}s?\b", text, re.IGNORECASE) is not None


# ---- gold


def gold(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
    """VADER compound valence - 2 * share of repeated word pairs, from -3 to 1; 0 for an empty text."""
    valences = valence(prompts, completions)
    return [
        kind - 2 * repeated_share(text_of(completion), 2)
        for kind, completion in zip(valences, completions, strict=True)
    ]


# ---- files


def write_prompts(output: str) -> None:
    """Write prompts.jsonl (24 nouns, for training), test_prompts.jsonl (the six held out) and validation_prompts.jsonl (twelve others, for
    evaluations while PPO trains) into the folder `output`.
    """
    training = [noun for noun in NOUNS if noun not in HELD_OUT]
    for file, nouns in (("prompts.jsonl", training), ("test_prompts.jsonl", HELD_OUT), ("validation_prompts.jsonl", VALIDATION)):
        write_jsonl(Path(output) / file, ({"prompt": prompt_of(noun), "noun": noun} for noun in nouns))


def write_demonstrations(output: str, base: str, seed: int = 0, rows: int = 1170, tokens: int = 64) -> None:
    """Write `rows` of the base model's own stories, as answers to the prompts of the training nouns, to the file `output`.

    A story begins "Once upon a time, there was a {size}{noun}", has `tokens` tokens, and is kept if it goes on to name the noun
    and repeats little. Raises UserError when the model hardly ever writes such a story.
    """
    teller = Teller(base, registry=None)
    training = [noun for noun in NOUNS if noun not in HELD_OUT]
    kept: list[dict[str, str]] = []
    for number in range(12):
        nouns = [noun for noun in training for _ in range(24)]
        openings = [f"Once upon a time, there was a {SIZES[i % len(SIZES)]}{noun}" for i, noun in enumerate(nouns)]
        for noun, opening, text in zip(nouns, openings, teller.go_on(openings, tokens, seed, number), strict=True):
            if names(noun, text) and repeated_share(opening + text, 2) <= MOST_REPEATED:
                kept.append({"prompt": prompt_of(noun), "completion": (opening + text).strip()})
        if len(kept) >= rows:
            break
    else:
        raise UserError(
            f"{base}: only {len(kept)} of {12 * len(nouns)} stories name their noun and repeat little; expected {rows}"
        )
    random.Random(seed).shuffle(kept)
    write_jsonl(Path(output), kept[:rows])


def write_pairs(output: str, policy: str, registry: str, seed: int = 0, rows: int = 3000, tokens: int = 56) -> None:
    """Write preference pairs to the file `output`: two stories of `policy` (a registry name such as sft/stories) for one prompt.

    The label is drawn from the difference in gold. One pair in six is about a held-out noun: the chain's split keeps those out of
    training, and the reward model's accuracy is counted on them.
    """
    teller = Teller(policy, Path(registry))
    held_out = rows // 6
    training = [noun for noun in NOUNS if noun not in HELD_OUT]
    nouns = [training[i % len(training)] for i in range(rows - held_out)] + [
        HELD_OUT[i % len(HELD_OUT)] for i in range(held_out)
    ]
    prompts = [prompt_of(noun) for noun in nouns]
    first, second = (teller.answer(prompts, tokens, seed, number) for number in range(2))
    write_jsonl(Path(output), labelled(prompts, first, second, random.Random(f"labels {seed}")))


def labelled(
    prompts: Sequence[str], first: Sequence[str], second: Sequence[str], rng: random.Random
) -> Iterator[dict[str, str]]:
    """Rows of preference pairs, each label drawn with probability sigmoid(LABEL_SLOPE * difference in gold); equal texts are left out."""
    golds = zip(gold(prompts, first), gold(prompts, second), strict=True)
    for prompt, a, b, (gold_a, gold_b) in zip(prompts, first, second, golds, strict=True):
        prefers_a = rng.random() < 1 / (1 + math.exp(-LABEL_SLOPE * (gold_a - gold_b)))
        if a.strip() and b.strip() and a != b:
            yield {"prompt": prompt, "chosen": a if prefers_a else b, "rejected": b if prefers_a else a}


class Teller:
    """Samples stories from a model folder or a checkpoint of the registry: temperature 1, no stop at EOS."""

    def __init__(self, model: str, registry: Path | None) -> None:
        from stages import models
        from stages.tokens import load_tokens

        origin = models.find(model, registry or Path("no registry"))
        self.tokens = load_tokens(origin, "raw")
        self.model = models.load_policy(origin)

    def go_on(self, openings: Sequence[str], tokens: int, seed: int, number: int) -> list[str]:
        """What follows each opening, up to `tokens` tokens with the opening. It follows BOS, as in the model's own training."""
        tokenizer = self.tokens.tokenizer
        bos = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
        ids = [bos + tokenizer(opening, add_special_tokens=False).input_ids for opening in openings]
        sampled = self._sample(ids, tokens, seed, number)
        return [
            self._text(own[len(bos) :] + new[: tokens + len(bos) - len(own)])[len(opening) :]
            for opening, own, new in zip(openings, ids, sampled, strict=True)
        ]

    def answer(self, prompts: Sequence[str], tokens: int, seed: int, number: int) -> list[str]:
        """The completion of each prompt, `tokens` tokens long."""
        sampled = self._sample([self.tokens.formatter.prompt_ids(prompt) for prompt in prompts], tokens, seed, number)
        return [self.tokens.formatter.completion_text(ids) for ids in sampled]

    def _sample(self, prompt_ids: list[list[int]], tokens: int, seed: int, number: int) -> list[list[int]]:
        from stages.ppo.sampling import completion_seed, sample

        sampling = Sampling(max_new_tokens=tokens, stop_at_eos=False, generate_batch_size=256)
        seeds = [completion_seed(seed, number, i) for i in range(len(prompt_ids))]
        samples = sample(
            self.model,
            prompt_ids,
            sampling=sampling,
            eos_ids=self.tokens.eos_ids,
            pad_id=self.tokens.pad_id,
            seeds=seeds,
        )
        return [sample.completion_ids for sample in samples]

    def _text(self, ids: Sequence[int]) -> str:
        """The text of ids up to the first EOS."""
        return self.tokens.formatter.completion_text(ids)
