"""What a step's result depends on, and which steps there are."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest

from configs.errors import UserError
from configs.load import load_text
from configs.references import is_reference
from launch.chain import inputs
from launch.chain.progress import Progress, duration
from launch.chain.steps import Step, evaluation_config, steps_of
from launch.chain.summary import closing_lines, figures_of
from launch.prepare import find, prepare


def _chain(**sections):
    every = dict.fromkeys(("sft", "reward", "dpo", "ppo", "eval")) | {"prepare": {}}
    return SimpleNamespace(**every | sections)


def test_steps_come_in_order_with_prepare_steps_before_their_stage():
    prepare = {"pairs": SimpleNamespace(before="reward"), "base": SimpleNamespace(before="sft")}
    chain = _chain(sft=1, reward=SimpleNamespace(ensemble=None, member=lambda number: number), ppo=1, eval=1, prepare=prepare)
    assert [step.name for step in steps_of(chain)] == ["base", "sft", "pairs", "reward", "ppo", "eval"]
    assert [step.name for step in steps_of(chain, only="sft")] == ["base", "sft"]
    assert [(s.name, s.mode) for s in steps_of(chain, start="reward")] == [
        ("base", "given"), ("sft", "given"), ("pairs", "normal"), ("reward", "force"), ("ppo", "force"), ("eval", "force"),
    ]  # fmt: skip


def test_the_evaluation_of_a_chain_shares_what_the_chain_says_once():
    text = "name: demo\nbase: models/base\nattn_implementation: eager\ntemplate: chatml\nseed: 7\nsft: {data: rows.jsonl}\neval: {prompts: p.jsonl, scorers: [{kind: length, target: 3}]}\n"
    evaluation = evaluation_config(load_text(text, "chain", "c.yaml"), "runs/eval")
    assert (evaluation.attn_implementation, evaluation.template, evaluation.seed) == ("eager", "chatml", 7)


def test_what_is_a_reference():
    assert is_reference("sft/demo")
    assert is_reference("reward/demo@best:accuracy")
    assert not is_reference("openai/gpt2")
    assert not is_reference("./sft/demo")
    assert not is_reference(None)


def test_code_digest_follows_imports_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "ROOT", tmp_path)
    for name, text in {
        "stages/__init__.py": "",
        "stages/a.py": "def f():\n    from stages import b\n",
        "stages/b.py": "from stages.pack import inner",
        "stages/pack/__init__.py": "",
        "stages/pack/inner.py": "x = 1",
        "stages/other.py": "y = 1",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    before = inputs.code_digest("stages.a")
    (tmp_path / "stages/other.py").write_text("y = 22")
    assert inputs.code_digest("stages.a") == before
    (tmp_path / "stages/pack/inner.py").write_text("x = 22")
    assert inputs.code_digest("stages.a") != before


def test_a_stages_code_is_what_it_runs_and_no_other_stages():
    sft, ppo, evaluation = (set(inputs.code_files(f"stages.{name}")) for name in ("sft", "ppo", "evaluation"))
    assert {"stages.sft", "stages.training.publish", "stages.models"} <= sft
    assert not sft & {"stages.dpo", "stages.reward", "stages.ppo.maths", "launch.cli", "configs.load", "stages.registry.storage"}
    assert {"stages.ppo.maths", "stages.ppo.__main__"} <= ppo
    assert {"stages.evaluation.__main__", "stages.evaluation.evaluate"} <= evaluation
    assert "stages.ppo.__main__" not in evaluation


def test_data_digest_counts_content_not_where_results_go(tmp_path):
    data = tmp_path / "d.jsonl"
    data.write_text("1")
    config = {"data": [{"path": str(data)}], "output": str(tmp_path / "out")}
    before = inputs.data_digest(config)
    data.write_text("2")
    assert inputs.data_digest(config) != before
    assert inputs.without_ignored(config) == {"data": config["data"]}


def test_what_is_left_out_of_a_steps_inputs_changes_no_resumable_save_either():
    """Or a chain would start anew where its stage would go on: after health.action: stop, with one check left out."""
    from stages.training.changes import NOT_COMPARED

    assert {key for key in NOT_COMPARED if "." not in key} == inputs.IGNORED


def test_what_changed_is_named():
    assert inputs.what_changed({"config": 1, "data": 2}, {"config": 1, "data": 3, "code": 4}) == "data, code"


def test_a_prepare_step_must_write_what_it_promises(tmp_path):
    step = {"run": "os:getcwd", "with": {}, "writes": [str(tmp_path / "x")], "key": "k", "record": str(tmp_path / "done.json")}
    with pytest.raises(UserError, match="ended without writing"):
        prepare(step)
    assert not (tmp_path / "done.json").exists()


@pytest.mark.parametrize(("name", "says"), [("no_such_module:f", "there is no module 'no_such_module'"), ("os:no_such", "has no function 'no_such'")])
def test_a_prepare_function_that_is_not_there(name, says):
    with pytest.raises(UserError, match=says):
        find(name)


def test_prepare_prints_one_line_for_a_user_error(tmp_path):
    step = tmp_path / "step.json"
    step.write_text('{"run": "os:no_such", "with": {}, "writes": [], "key": "", "record": "x"}')
    done = subprocess.run([sys.executable, "-m", "launch.prepare", str(step)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "error: os:no_such: module os has no function 'no_such'\n")


def _decision(name: str, action: str = "run"):
    return SimpleNamespace(step=Step("stage", name, name), action=action, why="because", ref=None)


def test_time_left_comes_from_the_steps_own_progress_and_the_last_durations(tmp_path, monkeypatch, capsys):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr("launch.chain.progress.time.monotonic", lambda: clock.now)
    plan = [_decision("sft"), _decision("ppo"), _decision("eval", "skip")]
    out = __import__("sys").stdout
    first = Progress(tmp_path / "chain.json", plan, out)
    first.header(0, plan[0])
    assert first.left() is None  # nothing is known yet
    first.finished("sft", 40.0, "sft/x@1")
    first.header(1, plan[1])
    first.finished("ppo", 100.0, None)
    second = Progress(tmp_path / "chain.json", plan, out)
    second.header(0, plan[0])
    assert second.left() == 140  # 40 + 100; the skipped step counts nothing
    clock.now += 10
    second.line("sft 5/10  loss 0.3")
    assert second.left() == 110  # half in 10 s: 10 more, then 100
    assert second.total_seconds() == 140
    clock.now += 30
    second.line("sft 9/10  loss 0.3")
    assert "[1/3] sft: 0:40 of 0:40 in all · about 1:44 left" in capsys.readouterr().out  # 40/0.9 - 40 = 4.4


def test_durations_are_readable():
    assert [duration(s) for s in (5, 65, 3723)] == ["0:05", "1:05", "1:02:03"]


def test_a_models_figures_in_the_summary():
    figures = {"score": {"mean": 0.5, "se": 0.1}, "win_rate": 0.7, "win_rate_ci": [0.6, 0.8], "kl": None, "length": 12.5}
    assert figures_of(figures) == {
        "gold": 0.5, "gold_se": 0.1, "win_rate_vs_sft": 0.7, "win_rate_ci": [0.6, 0.8], "kl": None, "length": 12.5,
    }  # fmt: skip


@pytest.mark.parametrize(("now", "suggested"), [(0.25, "0.5"), (0.0, "0.05")])
def test_a_stronger_tie_to_the_sft_model_is_stronger_also_than_none(tmp_path, now, suggested):
    chain = _chain(output=tmp_path, registry=tmp_path / "registry", ppo=SimpleNamespace(kl_coef=now))
    lines = closing_lines(chain, SimpleNamespace(results={}), {"reward": {}, "seconds": 1})
    assert f"ppo.kl_coef={suggested} " in lines[-1]
