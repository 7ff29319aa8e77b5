"""Bad input of every kind: one clear error, exit code 2, no traceback, nothing lost and nothing half-written.

The cases are listed in bad_cases.py. Each is an `align` command; the process of its stage is replaced by a call of the same entry point,
but for the cases at the end, which run as they do for a person.
"""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from launch.cli import main
from tests.chain.bad_cases import CASES, chain, data, flipped, scorer, spoilt, stage
from tests.chain.bad_world import TRAIN, Case, World, flip, make_world, run_child_here
from tests.stage.runs import ENVIRONMENT, ROOT


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> World:
    """A world in which nothing is wrong."""
    return make_world(tmp_path_factory.mktemp("sound"))


@pytest.fixture
def world(sound: World, tmp_path, monkeypatch) -> World:
    """A copy of it, to spoil, on a machine without network."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for constant in ("huggingface_hub.constants.HF_HUB_OFFLINE", "datasets.config.HF_HUB_OFFLINE"):
        monkeypatch.setattr(constant, True)  # they have read the environment long ago
    shutil.copytree(sound.folder, tmp_path / "world")
    return World(tmp_path / "world")


def check_message(case: Case, out: str, err: str) -> None:
    """One error, which says what it must."""
    assert "Traceback" not in out + err
    assert sum(line.startswith("error: ") for line in err.splitlines()) == 1, err
    message = err[err.index("error: ") :]
    missing = [words for words in case.says if words not in message]
    assert not missing, f"the message does not say {missing}:\n{message}"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_bad_input(case: Case, world: World, monkeypatch, capfd) -> None:
    monkeypatch.setattr("launch.process.run_child", run_child_here)
    monkeypatch.setattr("launch.chain.runner.run_child", run_child_here)
    argv = case.arrange(world)
    before = world.files()
    capfd.readouterr()
    assert main(argv) == 2
    out, err = capfd.readouterr()
    check_message(case, out, err)
    assert world.written_since(before) == []


APART = [
    # name, processes, what to spoil and run, what the message says
    ("broken-JSON-before-two-processes-train", 2, data("sft", "odd.jsonl", ['{"prompt": "e",']), ("odd.jsonl:1", "broken JSON")),
    ("flipped-bit-that-rank-0-alone-sees", 2, spoilt(flipped("sft"), stage("reward")), ("sft/tiny@1", "its content changed")),
    ("scorer-that-fails-on-rank-1-alone", 2, scorer("raises_on_rank_1"), ("[rank 1]", "raises_on_rank_1", "KeyError: 'order'")),
    ("scorer-that-fails", 1, scorer("raises"), ("on prompt 0", "KeyError: 'order'", "bad_scorers.py")),
    ("chain-with-a-broken-row", 1, lambda world: chain(sft={"data": world.rows("odd.jsonl", ["{"]), "train": TRAIN})(world), ("odd.jsonl:1", "broken JSON")),
]  # fmt: skip


@pytest.mark.parametrize(("name", "processes", "arrange", "says"), APART, ids=[entry[0] for entry in APART])
def test_bad_input_in_processes_of_its_own(name, processes, arrange, says, world: World) -> None:
    """The real thing: `align` starts the stage (under accelerate launch where there are two processes), and nobody hangs."""
    argv = arrange(world)
    options = [f"machine={'cpu_ddp' if processes == 2 else 'cpu'}", f"processes={processes}"]
    if processes == 2 and argv[0] != "ppo":
        options.append("train.micro_batch_size=2")  # 4 rows shared by two processes: the batch must be sound for the bad input to be met
    before = world.files()
    run = subprocess.run(
        [sys.executable, "-m", "launch.cli", *argv, *options], env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 2, run.stdout + run.stderr
    check_message(Case(name, arrange, says), run.stdout, run.stderr)
    assert world.written_since(before) == []


def test_plain_accelerate_launch_tells_the_error_and_ends(world: World) -> None:
    """As a cluster starts it. The launcher adds its own report and ends with 1; ours is one line, told once."""
    flip(world.sft.model_dir / "model.safetensors")
    config = stage("dpo")(world)[-1]
    before = world.files()
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/cpu_ddp.yaml", "--main_process_port", "0"]
    run = subprocess.run([*launch, "-m", "stages.dpo", "--config", config], env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode != 0
    told = [line for line in run.stderr.splitlines() if line.startswith("error: ")]
    assert len(told) == 1, run.stderr
    assert "sft/tiny@1" in told[0]
    assert run.stderr.index("error: ") < run.stderr.index("Traceback"), "the launcher's report comes after the error"
    assert world.written_since(before) == []
