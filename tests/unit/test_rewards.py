"""Scorers: rules against hand-worked numbers, the user's function, weighted sums, the check of what a scorer returned."""

from __future__ import annotations

import sys
import textwrap

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter

from configs.errors import UserError
from configs.schema.scorers import ScorerSpec
from rewards.build import build_scorers, parse_spec
from rewards.combine import Weighted, WeightedSum
from rewards.protocol import Turn, check_scores, scorer_prompt, text_of, turns_of
from rewards.python import PythonFunction
from rewards.rules import Keyword, Length, Regex, Repetition


class Fixed:
    """A scorer that returns what it was made with."""

    def __init__(self, name: str, values: object) -> None:
        self.name, self.values = name, values

    def __call__(self, prompts, completions, **columns):
        return self.values


def message(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def test_length_is_zero_at_the_target_and_falls_linearly_to_minus_one():
    texts = ["", "one", "one two", "a b c d", "a b c d e f g h", "a " * 50]
    # target 4 words: |0-4|/4, |1-4|/4, |2-4|/4, 0, |8-4|/4, and never below -1
    assert Length(4)([""] * 6, texts) == [-1, -0.75, -0.5, 0, -1, -1]


def test_repetition_is_the_share_of_ngrams_that_stood_before():
    # "a b a b a": bigrams ab ba ab ba -> 2 of 4 repeated. "A b a B": ab ba ab, case ignored -> 1 of 3.
    scores = Repetition(2)([""] * 5, ["a b a b a", "A b a B", "a b c", "a", ""])
    assert scores == pytest.approx([-0.5, -1 / 3, 0, 0, 0])
    assert Repetition(1)([""], ["a a a a"]) == [-0.75]


def test_regex_searches_anywhere_and_refuses_a_broken_pattern():
    assert Regex(r"\border \d+")([""] * 3, ["your order 17", "reorder 17", ""]) == [1, 0, 0]
    with pytest.raises(UserError, match=r"regex:\(.*not a Python regular expression"):
        Regex("(")


def test_keyword_counts_whole_words_without_case():
    scorer = Keyword(["Sorry", "refund", "C++"])
    assert scorer([""] * 3, ["SORRY, a refund!", "refunds", "c++ is sorry"]) == pytest.approx([2 / 3, 0, 2 / 3])
    with pytest.raises(UserError, match="empty word"):
        Keyword(["a", " "])


def test_rules_take_the_message_lists_that_trl_hands_over():
    for rule in (Length(3), Repetition(1), Regex("b"), Keyword(["b", "z"])):
        assert rule([message("p")], [message("a b b")]) == rule(["p"], ["a b b"])


def test_text_and_turns_of_text_messages_and_objects():
    assert text_of([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}, Turn("assistant", "b")]) == "a\nb"
    assert turns_of("hi") == (Turn("user", "hi"),)
    assert turns_of([{"role": "system", "content": "s"}, Turn("user", "u")]) == (Turn("system", "s"), Turn("user", "u"))


def test_a_scorer_sees_text_of_a_single_question_and_messages_of_a_dialogue():
    assert scorer_prompt([Turn("user", "hi")]) == "hi"
    dialogue = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    assert scorer_prompt(dialogue) == scorer_prompt([Turn("system", "s"), Turn("user", "u")]) == dialogue


@pytest.mark.parametrize("values", [[1, 2.5], np.array([1, 2.5]), torch.tensor([1, 2.5]), [np.float32(1), torch.tensor(2.5)], (True, 2.5)])
def test_check_scores_takes_numbers_in_any_usual_shape(values):
    assert check_scores("s", values, 2) == [1.0, 2.5]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([1.0], "1 scores for 2 completions"),
        (None, "returned NoneType"),
        ("ab", "returned str"),
        (0.5, "returned float"),
        ([1.0, float("nan")], "score 1 is nan"),
        ([float("inf"), 1.0], "score 0 is inf"),
        ([1.0, "2"], "score 1 is '2'"),
        (torch.ones(2, 1), r"score 0 is \[1.0\]"),
    ],
)
def test_check_scores_names_the_scorer_and_what_is_wrong(values, said):
    with pytest.raises(UserError, match=f"scorer mine: .*{said}"):
        check_scores("mine", values, 2)


def test_weighted_sum_keeps_each_part():
    scorer = WeightedSum([Weighted(Fixed("a", [1.0, 2.0]), 2.0), Weighted(Fixed("b", [10.0, 20.0]), -0.5)])
    scores = scorer.score(["p"] * 2, ["c"] * 2)
    assert scores.total == [-3.0, -6.0]  # 2·1 - 0.5·10, 2·2 - 0.5·20
    assert scores.parts == {"a": [1.0, 2.0], "b": [10.0, 20.0]}
    assert scorer(["p"] * 2, ["c"] * 2) == [-3.0, -6.0]


def test_none_means_does_not_apply_but_something_must():
    parts = [Weighted(Fixed("a", [None, 2.0]), 1.0), Weighted(Fixed("b", [3.0, None]), 1.0)]
    assert WeightedSum(parts).score(["p"] * 2, ["c"] * 2).total == [3.0, 2.0]
    with pytest.raises(UserError, match="all returned None for completion 1"):
        WeightedSum([Weighted(Fixed("a", [1.0, None]), 1.0)])(["p"] * 2, ["c"] * 2)


def test_equal_scorers_get_distinct_names():
    scorer = WeightedSum([Weighted(Length(4), 1.0), Weighted(Length(4), 1.0)])
    assert list(scorer.parts) == ["length:4", "length:4#2"]


def test_centre_and_scale_of_a_sum_follow_the_weights():
    model = Fixed("reward/demo@1", [0.0])
    model.mean, model.std = 1.5, 2.0
    scorer = WeightedSum([Weighted(model, -2.0), Weighted(Length(4), 1.0)])
    assert scorer.mean == -3.0
    assert scorer.std == 4.0


def test_a_part_with_the_same_tokens_reads_ids_and_the_others_text():
    class Model(Fixed):
        token_key = "k"

        def score_ids(self, prompt_ids, completion_ids, finished):
            return torch.tensor([float(len(c)) for c in completion_ids])

    scorer = WeightedSum([Weighted(Model("m", [-1.0]), 1.0)])
    ids = {"prompt_ids": [[1]], "completion_ids": [[2, 3, 4]]}
    assert scorer.score(["p"], ["c"], token_key="k", **ids).total == [3.0]
    assert scorer.score(["p"], ["c"], token_key="other", **ids).total == [-1.0]
    assert scorer.score(["p"], ["c"], token_key=None, **ids).total == [-1.0]


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    """A function that writes a module into the working directory and returns its name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])

    def write(body: str) -> str:
        name = f"user_{abs(hash((body, str(tmp_path))))}"
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(body))
        return name

    return write


def test_the_users_function_is_called_with_the_columns_it_names(user_module):
    name = user_module("""
        def named(prompts, completions, order):
            return [float(len(p) + len(c) + o) for p, c, o in zip(prompts, completions, order)]
        def anything(prompts, completions, **columns):
            return [float(len(columns))] * len(prompts)
    """)
    columns = {"order": [10, 20], "item": ["x", "y"]}
    assert PythonFunction(f"{name}:named")(["a", "b"], ["cc", "d"], **columns) == [13, 22]
    assert PythonFunction(f"{name}:anything")(["a", "b"], ["cc", "d"], **columns) == [2, 2]
    with pytest.raises(UserError, match="needs the column order; the prompts have: item"):
        PythonFunction(f"{name}:named")(["a"], ["b"], item=["x"])


def test_an_exception_of_the_users_function_names_the_prompt_and_keeps_its_cause(user_module):
    name = user_module("""
        def f(prompts, completions, **columns):
            return [1 / len(c) for c in completions]
    """)
    with pytest.raises(UserError, match=f"scorer {name}:f: failed on prompt 2 of 3: ZeroDivisionError") as caught:
        PythonFunction(f"{name}:f")(["p"] * 3, ["a", "b", ""])
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert caught.value.__cause__.__traceback__ is not None


@pytest.mark.parametrize(
    ("body", "function", "said"),
    [
        ("", "f", "has no function 'f'"),
        ("f = 3", "f", "'f' is a int"),
        ("def f(x): return x", "f", r"takes \(x\); expected f\(prompts, completions"),
        ("import no_such_package_at_all", "f", "imports 'no_such_package_at_all', which is not installed"),
        ("1 / 0", "f", "failed to import: ZeroDivisionError"),
        ("def f(", "f", "failed to import: SyntaxError"),
    ],
)
def test_a_function_that_cannot_be_used_is_one_clear_error(user_module, body, function, said):
    name = user_module(body)
    with pytest.raises(UserError, match=said):
        PythonFunction(f"{name}:{function}")


def test_a_missing_module_says_where_it_was_looked_for(user_module, tmp_path):
    with pytest.raises(UserError, match=r"there is no module 'nowhere\.at\.all'.*working directory"):
        PythonFunction("nowhere.at.all:f")


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("length:40", {"kind": "length", "target": 40}),
        ("repetition:2", {"kind": "repetition", "ngram": 2}),
        ("regex:a:b/c", {"kind": "regex", "pattern": "a:b/c"}),
        ("keyword:sorry, refund", {"kind": "keyword", "words": ["sorry", "refund"]}),
        ("reward/demo@1", {"kind": "model", "checkpoint": "reward/demo@1"}),
        ("reward/demo@best:accuracy", {"kind": "model", "checkpoint": "reward/demo@best:accuracy"}),
        ("launch.demo.world:gold", {"kind": "python", "function": "launch.demo.world:gold"}),
    ],
)
def test_scorers_on_the_command_line(text, spec):
    assert parse_spec(text) == spec
    TypeAdapter(ScorerSpec).validate_python(spec)


@pytest.mark.parametrize("text", ["length:0", "length:many", "repetition:", "regex:", "nonsense", "a b:c", ""])
def test_scorers_that_are_not_understood(text):
    with pytest.raises(UserError, match="expected length:WORDS"):
        parse_spec(text)


def test_build_makes_every_kind_of_the_schema():
    texts = ["length:2", "repetition:2", "regex:a", "keyword:a", "reward/demo@1", "os.path:join"]
    specs = [TypeAdapter(ScorerSpec).validate_python({**parse_spec(t), "weight": 3}) for t in texts[:5]]
    scorer = build_scorers(specs, load_checkpoint=lambda ref: Fixed(ref, [7.0]))
    assert list(scorer.parts) == texts[:5]
    assert scorer(["p"], ["a b"]) == [3 * (0 + 0 + 1 + 1 + 7)]
    bad = TypeAdapter(ScorerSpec).validate_python(parse_spec(texts[5]))
    with pytest.raises(UserError, match=r"os\.path:join: the function takes"):
        build_scorers([bad], load_checkpoint=lambda ref: Fixed(ref, [7.0]))
