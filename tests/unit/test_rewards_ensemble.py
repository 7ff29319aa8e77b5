"""Reward ensembles: the combination against hand-worked numbers, calibration, the sum they stand in, their configs."""

from __future__ import annotations

import pytest
from pydantic import TypeAdapter, ValidationError

from configs.references import pin, references
from configs.schema import Chain
from configs.schema.scorers import ScorerSpec, reward_models
from launch.chain.steps import made_by, sections, stage_of, steps_of, trains
from rewards.build import build_scorers
from rewards.combine import Weighted, WeightedSum
from rewards.ensemble import RewardEnsemble, combine
from rewards.rules import Length

# Means 0 and 10, deviations 1 and 3: common mean 5, common deviation 2. Member A: 5 + (1 - 0)·2 = 7 and 5 + (-1)·2 = 3.
# Member B: 5 + (16 - 10)·2/3 = 9 and 5 + (10 - 10)·2/3 = 5. Half the distance between them is 1 for both completions.
SCORES, MEANS, STDS = [[1.0, -1.0], [16.0, 10.0]], [0.0, 10.0], [1.0, 3.0]


@pytest.mark.parametrize(
    ("how", "spread_coef", "expected"),
    [("mean", 0.0, [8.0, 4.0]), ("mean", 0.5, [7.5, 3.5]), ("mean", 2.0, [6.0, 2.0]), ("minimum", 0.0, [7.0, 3.0])],
)
def test_members_are_calibrated_and_combined(how, spread_coef, expected):
    combined = combine(SCORES, MEANS, STDS, how=how, spread_coef=spread_coef)
    assert combined.scores == pytest.approx(expected)
    assert combined.spread == pytest.approx([1.0, 1.0])


def test_a_members_zero_and_scale_do_not_matter():
    """Preferences say nothing about them: a member that adds 100 to every score, or counts in tenths, changes no centred score."""
    before = [score - 5.0 for score in combine(SCORES, MEANS, STDS, how="minimum", spread_coef=0).scores]
    moved = [[score + 100.0 for score in SCORES[0]], SCORES[1]]
    after = [score - 55.0 for score in combine(moved, [100.0, 10.0], STDS, how="minimum", spread_coef=0).scores]
    assert after == pytest.approx(before)
    tenths = combine([SCORES[0], [score * 10 for score in SCORES[1]]], [0.0, 100.0], [1.0, 30.0], how="minimum", spread_coef=0)
    assert [(score - 50.0) / 15.5 for score in tenths.scores] == pytest.approx([one / 2 for one in before])


class Member:
    """A reward model of this test: reads ids where it shares the policy's tokens."""

    def __init__(self, name: str, text: list[float], mean: float, std: float, ids: list[float] | None = None) -> None:
        self.name, self.text, self.mean, self.std, self.ids = name, text, mean, std, ids
        self.token_key = "shared" if ids is not None else "own"

    def __call__(self, prompts, completions, **columns):
        return self.text

    def score_ids(self, prompt_ids, completion_ids, finished):
        return self.ids


def members() -> list[Member]:
    return [Member("reward/a", [0.0, 0.0], 0.0, 1.0, ids=SCORES[0]), Member("reward/b", SCORES[1], 10.0, 3.0)]


def test_each_member_reads_the_ids_or_the_text_that_it_can():
    total = WeightedSum([Weighted(RewardEnsemble(members(), spread_coef=0.5), 2.0), Weighted(Length(1), 1.0)])
    scores = total.score(["p", "p"], ["one", ""], token_key="shared", prompt_ids=[[1]] * 2, completion_ids=[[2]] * 2)
    assert scores.total == pytest.approx([2 * 7.5 + 0, 2 * 3.5 - 1])
    assert list(scores.parts) == total.columns == ["reward/ax2", "length:1", "spread"]
    assert scores.parts["spread"] == pytest.approx([2.0, 2.0])  # as it counts in the total: weight 2
    assert total.mean == 2 * 5.0
    assert total.std == 2 * 2.0
    assert [name for name, _ in total.single()] == ["reward/a", "reward/b", "length:1"]


def test_a_sum_without_an_ensemble_has_no_spread():
    assert WeightedSum([Weighted(Length(1), 1.0)]).columns == ["length:1"]


def test_the_config_of_an_ensemble_builds_it_from_its_checkpoints():
    spec = TypeAdapter(ScorerSpec).validate_python({"kind": "ensemble", "checkpoints": ["reward/a", "reward/b"], "combine": "minimum"})
    assert reward_models([spec]) == ["reward/a", "reward/b"]
    by_name = {member.name: member for member in members()}
    assert build_scorers([spec], by_name.__getitem__)(["p", "p"], ["c", "c"]) == pytest.approx([5.0, 5.0])  # texts: A 5, B 9 and 5


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"checkpoints": ["reward/a"]}, "at least 2"),
        ({"checkpoints": ["reward/a", "reward/a"]}, "names a reward model twice: reward/a, reward/a"),
        ({"combine": "minimum", "spread_coef": 1.0}, "spread_coef is taken off the mean, and combine is minimum"),
        ({"spread_coef": -1.0}, "greater than or equal to 0"),
    ],
)
def test_mistakes_in_an_ensemble_are_said(changes, said):
    with pytest.raises(ValidationError, match=said):
        TypeAdapter(ScorerSpec).validate_python({"kind": "ensemble", "checkpoints": ["reward/a", "reward/b"]} | changes)


def chain(**ensemble: object) -> Chain:
    reward = {"data": "pairs.jsonl", "seed": 7} | ({"ensemble": ensemble} if ensemble else {})
    return Chain.model_validate({"name": "tiny", "base": "base", "sft": {"data": "d.jsonl"}, "reward": reward, "ppo": {"prompts": "p.jsonl"}})


def test_a_chain_trains_the_members_one_after_the_other_with_seeds_of_their_own():
    one = chain(members=3, combine="mean", spread_coef=0.5)
    assert [step.name for step in steps_of(one)] == ["sft", "reward", "reward-2", "reward-3", "ppo"]
    assert [step.name for step in steps_of(one, only="reward")] == ["reward", "reward-2", "reward-3"]
    trained = sections(one)
    assert [(c.name, c.seed, str(c.output)) for name, c in trained.items() if name.startswith("reward")] == [
        ("tiny", 7, "runs/tiny/reward"), ("tiny-2", 8, "runs/tiny/reward-2"), ("tiny-3", 9, "runs/tiny/reward-3"),
    ]  # fmt: skip
    assert (made_by(one, "reward/tiny-3"), made_by(one, "reward/tiny-4"), made_by(one, "sft/tiny")) == ("reward-3", None, "sft")
    (scorer,) = one.ppo.scorers
    assert (scorer.kind, scorer.combine, scorer.spread_coef) == ("ensemble", "mean", 0.5)
    assert scorer.checkpoints == ["reward/tiny", "reward/tiny-2", "reward/tiny-3"]


def test_without_an_ensemble_the_chain_is_as_before():
    assert list(sections(chain())) == ["sft", "reward", "ppo"]
    assert [scorer.kind for scorer in chain().ppo.scorers] == ["model"]
    assert sections(chain())["reward"] == sections(chain(members=2))["reward"], "the first member is the model that stands alone without"


def test_references_to_members_are_pinned_each():
    ppo = chain(members=2).ppo
    assert references(ppo) == {"init_from": "sft/tiny", "scorers.0.0": "reward/tiny", "scorers.0.1": "reward/tiny-2"}
    pinned = pin(ppo, lambda ref: f"{ref}@4")
    assert pinned.scorers[0].checkpoints == ["reward/tiny@4", "reward/tiny-2@4"]
    assert pinned.init_from == "sft/tiny@4"


def test_only_the_names_of_training_steps_are_taken_from_node_0():
    assert all(map(trains, sections(chain(members=12))))
    assert [stage_of(name) for name in ("sft", "reward-12")] == ["sft", "reward"]
    assert not any(map(trains, ("eval", "reward-", "reward-2/../x", "-2", "", None)))


@pytest.mark.parametrize("how", [{"combine": "minimum"}, {"spread_coef": 0.5}])
def test_a_negative_weight_is_not_taken_with_what_lowers_scores_where_members_disagree(how):
    """-1 * (mean - 0.5 * spread) pays for disagreement."""
    spec = {"kind": "ensemble", "checkpoints": ["reward/a", "reward/b"], "weight": -1.0}
    with pytest.raises(ValueError, match=r"weight -1 turns .* around"):
        TypeAdapter(ScorerSpec).validate_python(spec | how)
    assert TypeAdapter(ScorerSpec).validate_python(spec).weight == -1.0
