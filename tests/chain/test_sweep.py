"""`align sweep` over fake stages: what is shared, ended early, gone on with, recorded as failed, and what comes out."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from configs.errors import UserError
from configs.exit_codes import REQUEUE
from configs.load import load
from stages.registry import Registry
from tests.chain.sweeps import LR, Sweeps

LIST = f"{LR}=1e-2,1e-3,1e-1"


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_DIR", str(tmp_path))
    monkeypatch.setattr("launch.sweep.run.POLL", 0.05)
    return Sweeps(tmp_path)


def test_a_grid_finds_the_best_and_its_config_runs_as_it_is(world, capfd):
    assert world.run(LIST, sampler="grid", pruner="none", jobs=2) == 0
    found = world.results()
    assert [row["values"][LR] for row in found["trials"]] == [1e-3, 1e-2, 1e-1]
    # (log10 lr + 3)^2 + 1/4
    assert [row["value"] for row in found["trials"]] == pytest.approx([0.25, 1.25, 4.25])
    assert found["configured"]["value"] == pytest.approx(1.25)
    assert found["configured"]["number"] == 0, "the config's own values come first"
    chain = load(world.out / "best.yaml", "chain")
    assert chain.sft.train.learning_rate == 1e-3
    assert chain.output == world.folder / "out"
    assert chain.ppo is not None, "the whole chain, not the trial's part of it"
    assert f"{LR}=0.001" in found["command"]
    threads = {call.rpartition(":")[2] for call in world.calls()}
    cores = len(os.sched_getaffinity(0))
    assert threads == {os.environ.get("OMP_NUM_THREADS", str(max(1, cores // 2)))}
    published = Registry(world.out / "registry").resolve(found["best"]["published"]["sft"])
    assert published.info("config")["train"]["learning_rate"] == 1e-3


def test_what_is_not_swept_is_made_once_and_only_what_the_metric_needs(world):
    assert world.run("dpo.train.learning_rate=1e-2,1e-3", metric="dpo/eval_loss", sampler="grid") == 0
    assert sorted(call.rpartition(":")[0] for call in world.calls()) == ["0000:dpo", "0001:dpo", "shared:sft"]
    registry = Registry(world.out / "registry")
    assert len(registry.list("sft")) == 1
    assert {json.loads((c.model_dir / "config.json").read_text())["init_from"] for c in registry.list("dpo")} == {"sft/tiny@1"}
    assert world.run("dpo.train.learning_rate=1e-2,1e-3", metric="dpo/eval_loss", sampler="grid") == 0
    assert world.calls() == []


def test_successive_halving_ends_bad_trials_early_and_keeps_no_state_of_them(world):
    world.behave(seconds=0.15)
    assert world.run(LIST, sampler="grid", reduction=2) == 0
    states = {row["values"][LR]: row for row in world.results()["trials"]}
    assert states[1e-2]["state"] == "done", "the first is compared with nothing"
    assert states[1e-3]["state"] == "done"
    assert states[1e-1]["state"] == "ended early"
    assert states[1e-1]["evaluations"] < 4
    folder = world.out / "trials" / f"{states[1e-1]['number']:04d}"
    assert (folder / "log").is_file()
    assert (folder / "sft" / "metrics.jsonl").is_file()
    assert not (folder / "sft" / "resume").exists()
    assert not [c for c in Registry(world.out / "registry").list("sft") if c.info("config")["train"]["learning_rate"] == 1e-1]


def test_a_killed_sweep_goes_on_where_it_was(world):
    """kill -9 while trial 1 hangs at its second evaluation: trial 0 is kept, trial 1 continued from its save, nothing left running."""
    world.behave(hang="0001:2")
    options = {"sampler": "grid", "pruner": "none"}
    sweep = subprocess.Popen([sys.executable, "-m", "tests.chain.sweeps", str(world.folder), json.dumps(options), LIST])
    state = world.out / "trials" / "0001" / "sft" / "resume" / "checkpoint"
    _wait(lambda: state.exists() and state.read_text() == "2")
    with pytest.raises(UserError, match=rf"`align sweep` \(process {sweep.pid} on .* works in this folder already"):
        world.run(LIST, **options)
    sweep.kill()
    sweep.wait()
    journal = world.out / "study.jsonl"
    journal.write_bytes(journal.read_bytes() + b'{"op_code":4,"wor')  # as a power failure leaves it
    (world.out / "study.jsonl.lock").touch()
    _wait(lambda: not _running("tests.chain.fake_trial"))
    assert [call.rpartition(":")[0] for call in world.calls()] == ["0000:sft", "0001:sft"]
    world.behave()
    assert world.run(LIST, **options) == 0
    assert [call.rpartition(":")[0] for call in world.calls()] == ["0001:sft", "0002:sft"]
    steps = [json.loads(line)["step"] for line in (world.out / "trials" / "0001" / "sft" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [10, 20, 30, 40], "it went on from its save"
    assert set(world.states().values()) == {"done"}
    before = journal.read_bytes()
    assert world.run(LIST, **options) == 0, "and there is nothing left to do"
    assert world.calls() == []
    assert journal.read_bytes().startswith(before)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, REQUEUE)])
def test_told_to_stop_trials_are_saved_and_the_sweep_says_how_to_go_on(world, number, code):
    world.behave(hang="0000:2")
    sweep = subprocess.Popen([sys.executable, "-m", "tests.chain.sweeps", str(world.folder), "{}", LIST], stdout=subprocess.PIPE, text=True)
    state = world.out / "trials" / "0000" / "sft" / "resume" / "checkpoint"
    _wait(lambda: state.exists() and state.read_text() == "2")
    sweep.send_signal(number)
    out, _ = sweep.communicate(timeout=30)
    assert sweep.returncode == code
    assert "1 trial(s) are saved and go on; to continue: align sweep" in out
    assert not _running("tests.chain.fake_trial")


def test_a_failed_trial_is_recorded_and_the_others_go_on(world):
    world.behave(crash="0001")
    assert world.run(LIST, sampler="grid", pruner="none") == 0
    rows = {row["number"]: row for row in world.results()["trials"]}
    assert [rows[number]["state"] for number in range(3)] == ["done", "failed", "done"]
    assert rows[1]["error"] == "ZeroDivisionError: in 0001"
    world.behave()
    assert world.run(LIST, sampler="grid", pruner="none", retry_failed=True) == 0
    assert set(world.states().values()) == {"done"}
    assert 1 not in world.states()


def test_a_full_disk_ends_it_cleanly(world, monkeypatch):
    """Of the study, or of a trial that says so: what was running is ended, the trial goes on once there is room."""
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    space = f"{LR}=1e-2,1e-3"
    with monkeypatch.context() as patch:
        patch.setattr("launch.sweep.study.tell", full)
        with pytest.raises(UserError, match=r"sweep can't be written: No space left on device; .* go on with: align sweep"):
            world.run(space, sampler="grid")
    assert not _running("tests.chain.fake_trial")
    world.behave(says={"0001": "error: out/sft: No space left on device"})
    with pytest.raises(UserError, match="No space left on device; the trials so far are kept"):
        world.run(space, sampler="grid")
    world.behave()
    assert world.run(space, sampler="grid", pruner="none") == 0
    assert set(world.states().values()) == {"done"}


def test_it_gives_up_when_the_first_trials_fail_alike(world):
    world.behave(fail_above=0.0)
    with pytest.raises(UserError, match=r"the loss is not finite at step 000\d\nThe first 2 trials failed alike") as error:
        world.run(f"{LR}=1e-5..1e-1:log", trials=6, give_up=2)
    assert "--retry-failed" in str(error.value)
    assert len(world.calls()) == 2
    world.behave()
    assert world.run(f"{LR}=1e-5..1e-1:log", trials=2, give_up=2, retry_failed=True) == 0
    assert sorted(world.states()) == [2, 3]
    assert "failed" not in world.states().values()


def test_a_sweep_of_something_else_is_refused_and_more_trials_are_not(world):
    space = f"{LR}=1e-5..1e-1:log"
    assert world.run(space, trials=1) == 0
    with pytest.raises(UserError, match="holds a sweep that differs in space"):
        world.run(f"{LR}=1e-5..1e-2:log", trials=1)
    with pytest.raises(UserError, match="differs in config"):
        world.run(space, trials=1, overrides=["sft.train.warmup=0.5"])
    assert world.run(space, trials=2) == 0
    assert sorted(world.states()) == [0, 1]


def test_equal_values_run_once_and_a_space_that_is_tried_through_ends(world):
    assert world.run("sft.seed=0,1", metric="sft/eval_loss", sampler="random", trials=12, pruner="none") == 0
    assert len(world.calls()) == 2
    rows = world.results()["trials"]
    assert len({row["values"]["sft.seed"] for row in rows}) == 2
    assert all(row["value"] == pytest.approx(4 * 0 + (math.log10(1e-2) + 3) ** 2 + row["values"]["sft.seed"] / 1000 + 0.25) for row in rows)


def test_checkpoints_of_the_best_only(world):
    assert world.run(f"{LR}=1e-2,1e-3", sampler="grid", pruner="none", keep=1) == 0
    assert [c.info("config")["train"]["learning_rate"] for c in Registry(world.out / "registry").list("sft")] == [1e-3]
    assert not list((world.out / "registry" / "trash").glob("2*"))


def test_a_metric_that_nobody_writes_names_those_there_are(world):
    with pytest.raises(UserError, match=r"metric 'evaluation/los': sft has none of that name; there are ece, loss, sft/eval_loss. Did you mean"):
        world.run(f"{LR}=1e-5..1e-1:log", metric="evaluation/los", give_up=1)


def test_preparations_that_depend_on_what_is_swept_write_into_the_trial(world):
    """The prompts do not depend on the reward model: made once. With the chain's seed swept, everything is the trial's own."""
    setting = world.setting("reward.train.learning_rate=1e-2,1e-3", metric="objective/score", stage="ppo")
    assert setting.parts.shared == {"sft", "prompts"}
    assert setting.parts.own == {"reward", "ppo"}
    chain = setting.trial_chain([("reward.train.learning_rate", 1e-3)], 3)
    assert chain.ppo.prompts[0].path == str(world.out / "shared" / "data" / "prompts.jsonl")
    assert chain.prepare == {}
    assert chain.reward.output == world.out / "trials" / "0003" / "reward"
    setting = world.setting("prepare.prompts.with.rows=3,4", metric="objective/score", stage="ppo")
    assert setting.parts.own == {"prompts", "ppo"}
    chain = setting.trial_chain([("prepare.prompts.with.rows", 4)], 3)
    path = str(world.out / "trials" / "0003" / "data" / "prompts.jsonl")
    assert chain.ppo.prompts[0].path == path
    assert chain.prepare["prompts"].arguments == {"path": path, "rows": 4}
    assert [str(file) for file in chain.prepare["prompts"].writes] == [path]


def test_a_stage_s_own_file(world):
    file = world.folder / "sft.yaml"
    file.write_text(f"name: alone\ninit_from: {world.folder}/base\nregistry: {world.folder}/reg\noutput: {world.folder}/alone\ndata: {world.folder}/demos.jsonl\ntrain: {{learning_rate: 1e-2, eval_every: 10}}\n")
    setting = world.setting("train.learning_rate=1e-2,1e-3", file=file)
    assert setting.output == world.folder / "alone" / "sweep"
    assert setting.fields[0].key == LR
    assert setting.subject.command([(LR, 1e-3)]) == f"align sft --config {file} train.learning_rate=0.001"
    assert setting.trial_chain([(LR, 1e-3)], 7).sft.registry == setting.output / "registry"
    assert "learning_rate: 0.001" in setting.subject.text([(LR, 1e-3)])
    (world.folder / "a.yaml").write_text("name: alone\ninit_from: base\ndata: demos.jsonl\n")
    with pytest.raises(UserError, match=r"its keys do not tell which stage's config this is; say so with --stage \(sft, reward, dpo\)"):
        world.setting(file=world.folder / "a.yaml")
    with pytest.raises(UserError, match="no such file"):
        world.setting(file=world.folder / "b.yaml")


def _wait(true) -> None:
    until = time.monotonic() + 30
    while not true():
        assert time.monotonic() < until, "not within 30 s"
        time.sleep(0.02)


def _running(word: str) -> list[int]:
    """Processes with a word in their command line, of our own folder."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = file.read_bytes().decode(errors="replace")
            owner = Path(file.parent / "environ").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if word in line and os.environ["FAKE_DIR"] in owner:
            found.append(int(file.parent.name))
    return found
