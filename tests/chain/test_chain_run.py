"""`align run` over fake stages: what runs, what is skipped, what is continued, and how it ends."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from configs.errors import UserError
from configs.exit_codes import REQUEUE
from stages.claim import Claim
from stages.processes import start_time
from tests.chain.fakes import World

ALL = ["sft", "reward", "dpo", "ppo", "eval"]


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_DIR", str(tmp_path))
    # The table wants every figure of an evaluation; test_chain_real.py shows a real one.
    monkeypatch.setattr("stages.evaluation.table.show", lambda results: print("table of", *results["models"]))
    return World(tmp_path)


def test_runs_everything_once_and_then_nothing(world, capfd):
    assert world.run() == 0
    assert world.calls() == ALL
    assert world.run() == 0
    assert world.calls() == []
    out = capfd.readouterr().out
    assert "[1/6] world: skip (its files are there and its inputs are unchanged)" in out
    assert "[3/6] reward: skip (reward/tiny@1 is published and its inputs are unchanged)" in out


def test_parents_are_pinned_to_the_versions_this_chain_made(world):
    world.run()
    assert world.init_from("ppo/tiny") == "sft/tiny@1"
    from stages.registry import Registry

    config = Registry(world.out / "registry").resolve("ppo/tiny").info("config")
    assert config["scorers"][0]["checkpoint"] == "reward/tiny@1"
    evaluated = (world.out / "eval" / "config.yaml").read_text()
    assert "ppo: ppo/tiny@1" in evaluated
    assert "against: sft" in evaluated


def test_a_changed_config_reruns_its_stage_and_what_is_made_from_it(world):
    world.run()
    world.calls()
    world.run("ppo.kl_coef=0.2")
    assert world.calls() == ["ppo", "eval"]
    world.run("ppo.kl_coef=0.2", "sft.train.epochs=2")
    assert world.calls() == ALL
    assert world.init_from("dpo/tiny") == "sft/tiny@2"


def test_an_older_published_result_serves_again(world):
    world.run()
    world.run("ppo.kl_coef=0.2")
    world.calls()
    world.run()
    assert world.calls() == ["eval"]  # ppo/tiny@1 is as the config wants it


def test_where_and_on_how_many_processes_changes_nothing(world):
    world.run()
    world.calls()
    world.run("processes=2")
    assert world.calls() == []


def test_changed_data_reruns_what_reads_it(world):
    world.run()
    world.calls()
    (world.folder / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "d"}\n')
    world.run()
    assert world.calls() == ["reward", "dpo", "ppo", "eval"]


def test_a_prepare_step_runs_again_when_its_file_or_arguments_change(world):
    world.run()
    world.calls()
    prompts = world.folder / "prompts.jsonl"
    whole = prompts.read_text()
    prompts.write_text("cut")
    world.run()
    assert prompts.read_text() == whole
    assert world.calls() == []  # the same file again
    world.run("prepare.world.with.rows=5")
    assert len(prompts.read_text().splitlines()) == 5
    assert world.calls() == ["ppo", "eval"]


def test_a_damaged_checkpoint_is_made_again(world):
    from stages.registry import Registry

    world.run()
    world.calls()
    (Registry(world.out / "registry").resolve("reward/tiny").model_dir / "config.json").unlink()
    world.run()
    assert world.calls()[0] == "reward"
    assert Registry(world.out / "registry").resolve("sft/tiny").version == 1


def test_only_and_from(world):
    assert world.run(only="sft") == 0
    assert world.calls() == ["sft"]
    assert world.run(start="reward") == 0
    assert world.calls() == ["reward", "dpo", "ppo", "eval"]
    assert world.run(start="reward") == 0
    assert world.calls() == ["reward", "dpo", "ppo", "eval"]
    world.run("sft.train.epochs=3", start="ppo")  # what lies before is taken as it is
    assert world.calls() == ["ppo", "eval"]
    world.run(only="eval")
    assert world.calls() == []


def test_from_runs_what_is_missing_before_it(world):
    world.run(start="reward")
    assert world.calls() == ALL


def test_only_without_its_parent_says_so(world):
    with pytest.raises(UserError, match="no checkpoint sft/tiny"):
        world.run(only="dpo")
    assert world.calls() == []


def test_only_a_section_that_is_not_there(world):
    world.file.write_text(world.file.read_text().replace("dpo:", "# dpo:"))
    with pytest.raises(UserError, match="no section 'dpo'; it has sft, reward, ppo, eval"):
        world.run(only="dpo")


def test_missing_files_are_all_named_before_anything_starts(world):
    (world.folder / "demos.jsonl").unlink()
    (world.folder / "pairs.jsonl").unlink()
    with pytest.raises(UserError) as error:
        world.run()
    assert "demos.jsonl" in str(error.value)
    assert "pairs.jsonl" in str(error.value)
    assert "prompts.jsonl" not in str(error.value)  # the prepare step writes it
    assert not world.out.exists()


def test_dry_run_tells_and_starts_nothing(world, capsys):
    assert world.run(dry_run=True, as_json=True) == 0
    steps = json.loads(capsys.readouterr().out)["steps"]
    assert [(s["step"], s["action"]) for s in steps] == [("world", "run"), *((name, "run") for name in ALL)]
    assert steps[2]["why"] == "sft runs first"
    assert steps[3]["command"] == "fake dpo"
    assert world.calls() == []
    assert not (world.out / "registry").exists()
    world.run()
    world.calls()
    world.run("ppo.kl_coef=0.2", dry_run=True)
    out = capsys.readouterr().out
    assert "[2/6] sft: skip (sft/tiny@1 is published and its inputs are unchanged)" in out
    assert "[5/6] ppo: run (changed since the last run: config)" in out
    assert "[6/6] eval: run (ppo runs first)" in out
    assert world.calls() == []


def test_the_real_commands_can_be_typed(world, capsys):
    from launch.chain.runner import run_chain

    assert run_chain(str(world.file), ["processes=2", "machine=cpu_ddp"], dry_run=True, as_json=True) == 0
    steps = {s["step"]: s for s in json.loads(capsys.readouterr().out)["steps"]}
    words = steps["sft"]["command"].split()
    assert words[:2] == ["accelerate", "launch"]
    assert words[-4:-1] == ["-m", "stages.sft", "--config"]
    assert Path(words[-1]).is_file()
    assert words[words.index("--num_processes") + 1] == "2"
    assert steps["eval"]["command"].startswith("python -m stages.evaluation --config ")


def test_a_user_error_of_a_stage_passes_through(world, capfd):
    world.behave(reward="user error")
    assert world.run() == 2
    err = capfd.readouterr().err
    assert err.count("error:") == 1
    assert "error: data.jsonl:3: no prompt" in err
    assert world.calls() == ["sft", "reward"]
    world.behave()
    assert world.run() == 0
    assert world.calls() == ["reward", "dpo", "ppo", "eval"]


def test_a_crash_stops_the_chain_with_its_code_and_names_the_log(world, capfd):
    world.behave(reward="crash")
    assert world.run() == 1
    assert "error: reward ended with exit code 1" in capfd.readouterr().err
    assert "ZeroDivisionError" in (world.out / "logs" / "reward.log").read_text()


@pytest.mark.parametrize("behaviour", ["abort", "worker aborts"])
def test_a_stage_whose_process_dies_of_a_signal_after_publishing_is_judged_by_what_it_published(world, behaviour, capfd):
    world.behave(sft=behaviour)
    assert world.run() == 0
    assert world.calls() == ALL
    assert "warning: sft published sft/tiny@1; then, as it ended, a signal ended a process of it" in capfd.readouterr().err


@pytest.mark.parametrize(("behaviour", "code"), [("abort before publishing", 134), ("fails late", 1)])
def test_other_failures_are_not_hidden_behind_that(world, behaviour, code):
    """Nothing published, though an older result of the same name is there; or published, and then an error of our own."""
    world.run()
    world.calls()
    world.behave(sft=behaviour)
    assert world.run(start="sft") == code
    assert world.calls() == ["sft"]


def test_a_stage_that_publishes_nothing_is_an_error(world):
    world.behave(sft="publish nothing")
    with pytest.raises(UserError, match="without publishing sft/tiny"):
        world.run()


def _start(world) -> tuple[subprocess.Popen, int]:
    """An `align run` in its own process, and the pid of its hanging stage."""
    run = subprocess.Popen([sys.executable, "-m", "tests.chain.fakes", str(world.file)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert run.stdout is not None
    for line in run.stdout:
        if "] pid " in line:
            return run, int(line.split()[-1])
    raise AssertionError(run.communicate())


def _gone(pid: int) -> bool:
    until = time.monotonic() + 5
    while start_time(pid) is not None and time.monotonic() < until:
        time.sleep(0.02)
    return start_time(pid) is None


def test_a_killed_run_leaves_no_stage_and_is_continued(world, capfd):
    world.behave(reward="hang")
    run, stage = _start(world)
    run.kill()
    run.communicate()
    assert _gone(stage)
    world.behave()
    world.calls()
    assert world.run() == 0
    assert world.calls() == ["reward", "dpo", "ppo", "eval"]
    out = capfd.readouterr().out
    assert "reward: continue (was interrupted)" in out
    assert "[reward] reward starts at 40" in out


def test_an_interrupted_stage_whose_config_changed_starts_anew_and_the_old_state_is_kept(world, capfd):
    world.behave(reward="hang")
    run, _stage = _start(world)
    run.kill()
    run.communicate()
    world.behave()
    assert world.run("reward.train.epochs=2") == 0
    assert "[reward] reward starts at 0" in capfd.readouterr().out
    assert (world.out / "previous" / "reward" / "resume").read_text() == "40"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, REQUEUE)])
def test_signals_end_the_stage_and_the_chain(world, number, code):
    world.behave(reward="hang")
    run, stage = _start(world)
    run.send_signal(number)
    _, err = run.communicate(timeout=20)
    assert run.returncode == code
    assert _gone(stage)
    assert "reward was interrupted; to continue: align run" in err
    assert world.calls() == ["sft", "reward"]


def test_a_second_run_in_the_same_folder_is_refused(world):
    world.behave(reward="hang")
    run, _stage = _start(world)
    try:
        with pytest.raises(UserError, match=rf"`align run` \(process {run.pid} on "):
            world.run()
    finally:
        run.terminate()
        run.communicate(timeout=20)
    world.behave()
    assert world.run() == 0


def test_a_bare_stage_at_work_in_a_steps_folder_is_left_alone(world):
    with Claim(world.out / "sft", "stages.sft"), pytest.raises(UserError, match=r"sft: `stages\.sft` "):
        world.run()
    assert world.calls() == []
    assert world.run() == 0


def test_the_summary_has_the_form_of_the_demo(world, capfd):
    assert world.run(as_json=True) == 0
    printed = json.loads(capfd.readouterr().out)
    summary = json.loads((world.out / "summary.json").read_text())
    assert printed["summary"] == summary
    assert set(summary) == {"seconds", "models", "reward"}
    assert list(summary["models"]) == ["base", "sft", "dpo", "ppo"]
    assert set(summary["models"]["ppo"]) == {"gold", "gold_se", "win_rate_vs_sft", "win_rate_ci", "kl", "length"}
    assert summary["models"]["ppo"]["gold"] == 0.4
    assert summary["reward"] == {"accuracy": 0.8, "best_shortcut": 0.7, "ece": 0.05}
    assert [row["action"] for row in printed["steps"]] == ["run"] * 6


def test_a_chain_of_sft_alone(world):
    lines = [line for line in world.file.read_text().splitlines() if not line.startswith(("reward:", "dpo:", "ppo:"))]
    world.file.write_text("\n".join(lines))
    assert world.run() == 0
    assert world.calls() == ["sft", "eval"]
    assert list(json.loads((world.out / "summary.json").read_text())["models"]) == ["base", "sft"]




def test_an_ensemble_is_trained_member_by_member(world):
    """Members are steps of their own: each is skipped, continued and run again by itself; PPO and the summary know them all."""
    two = "reward.ensemble={members: 2}"
    world.behave(**{"reward-2": "crash"})
    assert world.run(two) == 1
    assert world.calls() == ["sft", "reward", "reward-2"]
    world.behave()
    assert world.run(two) == 0
    assert world.calls() == ["reward-2", "dpo", "ppo", "eval"]
    from stages.registry import Registry

    registry = Registry(world.out / "registry")
    assert [registry.resolve(f"reward/{name}").info("config")["seed"] for name in ("tiny", "tiny-2")] == [0, 1]
    assert registry.resolve("ppo/tiny").info("config")["scorers"][0]["checkpoints"] == ["reward/tiny@1", "reward/tiny-2@1"]
    assert json.loads((world.out / "summary.json").read_text())["reward"]["accuracy"] == pytest.approx(0.7)  # 0.8 and 0.6
    world.run("reward.ensemble={members: 3}")
    assert world.calls() == ["reward-3", "ppo", "eval"], "the members that are there serve on; DPO reads none"
    world.run(two, only="reward")
    assert world.calls() == []
    world.run()
    assert world.calls() == ["ppo", "eval"], "one reward model is what the first member is"
