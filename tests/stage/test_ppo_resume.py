"""A PPO run that was killed goes on as if it had not been: weights and metrics to the bit, or a refusal that says why."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from configs.errors import UserError
from stages.ppo import state
from stages.registry import Registry
from tests.stage import ppo_runs
from tests.stage.ppo_runs import LORA, metrics, publish_reward, run, settings, weights, workspace

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.usefixtures("one_thread")
ITERATIONS = {"iterations": 7, "save_every": 2}
MORTAL = {"kind": "python", "function": "tests.stage.ppo_runs:mortal"}
MODES = {
    "full": {"scorers": [MORTAL], "adaptive_kl": {"target": 1.0, "horizon": 100}},
    "lora": {"lora": LORA, "scorers": [MORTAL, {"kind": "model", "checkpoint": "reward/adapter"}]},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = workspace(tmp_path_factory.mktemp("resume"))
    publish_reward(folder, "adapter", lora=True)
    return folder


def values_of(place, mode, output):
    return settings(place, output, ITERATIONS, **MODES[mode], name=mode)


@pytest.fixture(scope="module")
def uninterrupted(place):
    """(metrics, weights) of runs that nothing happened to, by mode."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = {}
    for mode in MODES:
        values = values_of(place, mode, f"whole-{mode}")
        checkpoint = run(values)
        found[mode] = metrics(values), weights(checkpoint)
    torch.set_num_threads(threads)
    return found


def die(values, how, at, monkeypatch):
    """Run until the scorer's call number `at` (from 1), which fails, in this process."""
    monkeypatch.setenv("PPO_TEST_DIES_AT", f"{how}:{at}")
    monkeypatch.setattr(ppo_runs, "calls", 0)
    with pytest.raises(KeyboardInterrupt):
        run(values)
    monkeypatch.delenv("PPO_TEST_DIES_AT")


def assert_as_uninterrupted(values, expected, checkpoint):
    lines, tensors = expected
    assert [line["iteration"] for line in metrics(values)] == list(range(1, 8))
    assert metrics(values) == lines
    found = weights(checkpoint)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize(("mode", "at"), [("full", 4), ("lora", 6)])
def test_trap_14_a_run_killed_by_the_kernel_ends_as_the_uninterrupted_run_to_the_bit(place, uninterrupted, mode, at):
    """SIGKILL in iteration 4 or 6, one iteration after a save, in a process of its own; then the same config once more."""
    values = values_of(place, mode, f"killed-{mode}")
    config = place / f"killed-{mode}.json"
    config.write_text(json.dumps(values))
    environment = os.environ | {"PPO_TEST_DIES_AT": f"kill:{at}", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run([sys.executable, "-m", "stages.ppo", "--config", str(config)], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == -9, ended.stderr
    assert len(metrics(values)) == at - 1
    newest = (at - 1) // 2 * 2
    assert sorted(p.name for p in (Path(values["output"]) / "resume").glob("checkpoint-*")) == [f"checkpoint-{n}" for n in (newest - 2, newest) if n]
    assert_as_uninterrupted(values, uninterrupted[mode], run(values))
    assert not (Path(values["output"]) / "resume").exists(), "a published run needs no saves"


@pytest.mark.parametrize("at", [1, 2, 3, 7])
def test_trap_14_wherever_a_run_is_cut_it_ends_alike(place, uninterrupted, at, monkeypatch):
    values = values_of(place, "full", f"cut-{at}")
    die(values, "fail", at, monkeypatch)
    assert_as_uninterrupted(values, uninterrupted["full"], run(values))


def test_trap_14_a_run_that_is_cut_again_and_again_ends_alike(place, uninterrupted, monkeypatch):
    values = values_of(place, "lora", "often")
    for at in (4, 3, 1):
        die(values, "fail", at, monkeypatch)
    assert_as_uninterrupted(values, uninterrupted["lora"], run(values))


def test_a_run_that_was_complete_but_for_its_publication_is_published(place, uninterrupted, monkeypatch):
    from stages.ppo import train

    values = values_of(place, "full", "unpublished")

    def full_disk(*_, **__):
        raise UserError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(train, "publish_checkpoint", full_disk)
        with pytest.raises(UserError, match="no room"):
            run(values)
    assert (Path(values["output"]) / "resume" / "checkpoint-6").exists()
    assert_as_uninterrupted(values, uninterrupted["full"], run(values))


@pytest.mark.parametrize("file", ["weights.safetensors", "optimizer.safetensors", "state.json", "sealed.json"])
def test_a_damaged_newest_save_is_named_and_the_older_one_continues(place, uninterrupted, file, monkeypatch, capsys):
    values = values_of(place, "full", f"damaged-{file.split('.')[0]}")
    die(values, "fail", 6, monkeypatch)
    saves = Path(values["output"]) / "resume"
    damaged = saves / "checkpoint-4" / file
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1 if file != "sealed.json" else 0xFF
    damaged.write_bytes(content)
    capsys.readouterr()
    checkpoint = run(values)
    said = capsys.readouterr().out
    assert "checkpoint-4 is ignored and put aside as damaged-checkpoint-4" in said
    assert f"{file} is damaged" in said
    assert "continuing from checkpoint-2" in said
    assert_as_uninterrupted(values, uninterrupted["full"], checkpoint)


def test_a_save_that_was_not_finished_and_a_torn_line_of_metrics_are_left_behind(place, uninterrupted, monkeypatch, capsys):
    values = values_of(place, "full", "torn")
    die(values, "fail", 6, monkeypatch)
    output = Path(values["output"])
    (output / "resume" / ".staging-6").mkdir()
    (output / "resume" / ".staging-6" / "weights.safetensors").write_bytes(b"half")
    unsealed = output / "resume" / "checkpoint-5"
    unsealed.mkdir()
    (unsealed / "state.json").write_text("{}")
    with (output / "metrics.jsonl").open("a") as stream:
        stream.write('{"iteration": 6, "objective/sc')
    checkpoint = run(values)
    assert "checkpoint-5 is ignored and put aside as damaged-checkpoint-5: it was not finished" in capsys.readouterr().out
    assert_as_uninterrupted(values, uninterrupted["full"], checkpoint)


def test_saves_are_two_and_hold_what_training_changes_and_no_more(place, monkeypatch):
    values = values_of(place, "lora", "held")
    die(values, "fail", 7, monkeypatch)
    saves = Path(values["output"]) / "resume"
    assert sorted(p.name for p in saves.iterdir()) == ["checkpoint-4", "checkpoint-6"]
    names = set(load_file(saves / "checkpoint-6" / "weights.safetensors"))
    assert {n for n in names if n.startswith("value_head.")} == {"value_head.weight", "value_head.bias"}, "the value function is saved"
    assert all(".lora_" in n for n in names if not n.startswith("value_head."))
    assert not any(".reward" in n for n in names)
    position = state.Position(**json.loads((saves / "checkpoint-6" / "state.json").read_text()))
    assert position._replace(guard=None) == state.Position(6, 0.05)
    assert position.guard["guard"]["history"], "what the guard against bad numbers compares with"


@pytest.mark.parametrize(
    ("change", "message"),
    [("prompts", r"data\.prompts: \w{12}… → \w{12}…"), ("kl_coef", "kl_coef: 0.05 → 0.2"), ("seed", "seed: 0 → 1"), ("parent", "parents: ")],
)
def test_a_run_whose_inputs_have_changed_is_refused(place, change, message, monkeypatch):
    values = values_of(place, "lora", f"changed-{change}")
    die(values, "fail", 4, monkeypatch)
    if change == "prompts":
        other = place / "other.jsonl"
        other.write_text((place / "prompts.jsonl").read_text() + '{"prompt": "one more"}\n')
        monkeypatch.setattr("stages.data.read_prompts", _reading(other))
    elif change == "parent":
        publish_reward(place, "adapter", lora=True, seed=9)
    else:
        values[change] = {"kl_coef": 0.2, "seed": 1}[change]
    published = len(Registry(values["registry"]).list("ppo"))
    with pytest.raises(UserError, match=message):
        run(values)
    assert len(Registry(values["registry"]).list("ppo")) == published
    assert (Path(values["output"]) / "resume" / "checkpoint-2").exists(), "nothing is lost by a refusal"
    if change == "kl_coef":
        run(values | {"allow_changed": ["config"]})


@pytest.mark.parametrize("change", [{"lora": {"rank": 8, "alpha": 8}}, {"lora": None}, {"lora": None, "value_function": "head"}])
def test_a_save_of_other_weights_is_refused_even_where_the_config_may_change(place, change, monkeypatch):
    values = values_of(place, "lora", f"other-weights-{len(str(change))}")
    die(values, "fail", 4, monkeypatch)
    with pytest.raises(UserError, match=r"checkpoint-2 holds other weights than this config trains: .*; what is trained can't change within a run"):
        run(values | change | {"allow_changed": ["config"]})
    run(values)  # the refusal has left no trace: what the save was made from is asked of the save


def test_an_average_that_is_switched_on_within_a_run_starts_there(place, monkeypatch):
    """The newest save, after iteration 6, is without one: with a decay near 1 what is published is the policy after it, not after iteration 7."""
    values = values_of(place, "full", "average-on")
    die(values, "fail", 7, monkeypatch)
    saved = load_file(Path(values["output"]) / "resume" / "checkpoint-6" / "weights.safetensors")
    found = weights(run(values | {"ema_decay": 0.999999, "allow_changed": ["config"]}))
    assert max((saved[f"policy.{name}"] - tensor).abs().max().item() for name, tensor in found.items()) < 1e-6


def _reading(file):
    """Other rows under the same path: what counts is what was read."""
    from configs.schema.common import Source
    from stages.data import read_prompts

    return lambda sources: read_prompts([Source(path=str(file))])
