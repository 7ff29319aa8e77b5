"""No trial of a sweep looks at a row of the test part, and the chain's own evaluation stays as it was."""

from __future__ import annotations

import json

import pytest

from configs.errors import UserError
from configs.schema import Chain, EvalConfig
from launch.sweep.held_out import evaluated_on, untested
from launch.sweep.setting import setting_of
from launch.sweep.subject import subject_of
from stages.data import Splitter
from stages.evaluation.prompts import choose_prompts

SCORER = [{"kind": "length", "target": 5}]


def chain_of(folder, evaluation=None, ppo=None, split=None):
    rows = [json.dumps({"prompt": f"say {number}"}) + "\n" for number in range(60)]
    (folder / "prompts.jsonl").write_text("".join(rows[:40]))
    (folder / "others.jsonl").write_text("".join(rows[40:]))
    data = {
        "name": "tiny", "base": str(folder), "output": str(folder / "out"), "split": {"validation": 0.2, "test": 0.2} | (split or {}), "sft": {"data": str(folder / "demos.jsonl")},
        "ppo": {"prompts": str(folder / "prompts.jsonl"), "scorers": SCORER} | (ppo or {}), "eval": {"prompts": str(folder / "prompts.jsonl"), "scorers": SCORER} | (evaluation or {}),
    }  # fmt: skip
    return Chain.model_validate_json(json.dumps(data))


def prompts_of(chain):
    """What `align eval` would complete."""
    chosen = choose_prompts(EvalConfig(**dict(chain.eval), checkpoints={"a": "b"}, split=chain.split))
    return {row.prompt if isinstance(row.prompt, str) else row.prompt[-1].content for row in chosen}, {Splitter(chain.split).of(row) for row in chosen}


def test_a_trial_is_evaluated_on_the_validation_part_and_the_chain_on_its_test_part(tmp_path):
    chain = chain_of(tmp_path)
    trial = untested(chain, frozenset({"ppo", "eval"}))
    assert prompts_of(chain)[1] == {"test"}
    assert prompts_of(trial)[1] == {"validation"}
    assert not prompts_of(trial)[0] & prompts_of(chain)[0]
    assert trial.sft.evaluation.test, "this SFT is not the trial's"
    assert not untested(chain, frozenset({"sft", "eval"})).sft.evaluation.test


@pytest.mark.parametrize("evaluation", [{"subset": "all"}, {}])
def test_a_file_that_is_for_the_end_as_a_whole_is_not_looked_at(tmp_path, evaluation):
    """With subset: all, and as split.test_prompts: the validation part of ppo.prompts is taken instead."""
    others = str(tmp_path / "others.jsonl")
    chain = chain_of(tmp_path, evaluation={"prompts": others} | evaluation, split={"test_prompts": None if evaluation else others})
    found, parts = prompts_of(untested(chain, frozenset({"eval"})))
    assert parts == {"validation"}
    assert not found & prompts_of(chain)[0]
    assert evaluated_on(chain)[2] == "the validation part of ppo.prompts"


def test_prompts_that_ppo_evaluates_on_stand_in_where_nothing_is_split_off(tmp_path):
    others, split = str(tmp_path / "others.jsonl"), {"validation": 0.0, "test": 0.0, "test_prompts": str(tmp_path / "prompts.jsonl")}
    chain = chain_of(tmp_path, ppo={"evaluation": {"prompts": others}}, split=split)
    assert prompts_of(untested(chain, frozenset({"eval"})))[0] == {f"say {number}" for number in range(40, 60)}
    overlapping = chain_of(tmp_path, ppo={"evaluation": {"prompts": str(tmp_path / "prompts.jsonl")}}, split=split)
    with pytest.raises(UserError, match=r"ppo.evaluation.prompts: some of its prompts are of the test part .* never to choose by"):
        untested(overlapping, frozenset({"eval"}))


def test_a_chain_that_holds_nothing_out_but_the_test_part_is_refused(tmp_path):
    chain = chain_of(tmp_path, split={"validation": 0.0})
    with pytest.raises(UserError, match=r"eval: split.validation is 0, so that .* Set split.validation=0.05"):
        untested(chain, frozenset({"eval"}))
    assert untested(chain, frozenset({"ppo"})).eval == chain.eval, "no trial runs it"


def test_a_sweep_says_what_its_trials_are_evaluated_on(tmp_path):
    file = tmp_path / "chain.json"
    file.write_text(chain_of(tmp_path).model_dump_json(by_alias=True))
    for name in ("config.json", "demos.jsonl"):
        (tmp_path / name).write_text('{"prompt": "a", "completion": "b"}\n')
    setting = setting_of(subject_of(str(file), []), {"space": {"ppo.kl_coef": [0.05, 0.1]}, "metric": "eval/ppo/score", "sampler": "grid"})
    assert any("evaluated on the validation part of eval.prompts" in note for note in setting.notes)
    assert setting.trial_chain([("ppo.kl_coef", 0.1)], 1).eval.subset == "validation"
    assert "subset: test" in setting.subject.text([("ppo.kl_coef", 0.1)]), "best.yaml"
    assert setting.about()["evaluated"] == "held out", "a sweep that was begun on the test part is not gone on with"
