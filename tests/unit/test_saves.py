"""Saves as folders: staged, sealed, read back, rotated, put aside; and the diff by which a resume is refused."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import stat
from pathlib import Path
from types import SimpleNamespace

import pytest

from stages.ppo import state
from stages.training import changes, resume, saves
from stages.training.lines import Appended
from stages.training.ranks import say
from stages.training.saves import Failure, attempted


def make(folder: Path, step: int, content: str = "weights", **more):
    """A save of one file; why there is none."""
    return saves.store(folder, f"checkpoint-{step}", lambda staging: attempted(lambda: (staging / "a.txt").write_text(f"{content} {step}")), {"data": "x"}, **more)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_the_older_ones_go_when_the_new_one_has_been_read_back(tmp_path):
    for step in (1, 2, 3):
        assert make(tmp_path, step) is None
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-3"]
    assert make(tmp_path, 4, keep=["checkpoint-2"]) is None
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]
    assert [save.name for save in saves.verified(tmp_path)] == ["checkpoint-4", "checkpoint-3", "checkpoint-2"]
    assert saves.read_seal(tmp_path / "checkpoint-4")["depends_on"] == {"data": "x"}


COPIES = ("checkpoint-2-backup", "checkpoint-2.old", "checkpoint-²", "checkpoint-", "checkpoint-02", "damaged-checkpoint-1-backup", "best-1-backup")


def test_a_copy_beside_the_saves_is_no_save_and_is_left_alone(tmp_path, capsys):
    """`cp -r checkpoint-2 checkpoint-2-backup`: the next start, and every save, ended with a ValueError."""
    for step in (1, 2):
        make(tmp_path, step)
    for name in COPIES:
        shutil.copytree(tmp_path / "checkpoint-2", tmp_path / name)
    (tmp_path / "checkpoint-1" / "a.txt").write_text("damaged")
    shutil.copytree(tmp_path / "checkpoint-1", tmp_path / "best-3")
    assert [save.name for save in saves.verified(tmp_path)] == ["checkpoint-2"]
    assert resume.choose_save(tmp_path, SimpleNamespace(allow_changed=[]), {"data": "x"}).name == "checkpoint-2"
    assert make(tmp_path, 3) is None
    saves.retire_newer(tmp_path / "checkpoint-2")
    state.forget_bests(tmp_path, [])
    assert names(tmp_path) == sorted((*COPIES, "checkpoint-2"))
    saves.forget(tmp_path)
    assert names(tmp_path) == sorted(COPIES), "the run is published; what is somebody's own stays"
    assert "what is not its own stays there: best-1-backup, checkpoint-, checkpoint-02, checkpoint-2-backup, checkpoint-2.old …" in capsys.readouterr().out
    assert all((tmp_path / name / "a.txt").read_text() == "weights 2" for name in COPIES)


def test_the_folder_of_a_published_runs_saves_goes(tmp_path):
    make(tmp_path / "resume", 1)
    (tmp_path / "resume" / "identity.json").write_text("{}")
    (tmp_path / "resume" / "damaged-checkpoint-1.2").mkdir()
    saves.forget(tmp_path / "resume")
    assert names(tmp_path) == []


def test_one_that_reads_back_otherwise_is_put_aside_and_none_is_removed(tmp_path, monkeypatch):
    for step in (1, 2):
        make(tmp_path, step)
    with monkeypatch.context() as patch:
        patch.setattr(saves, "hash_file", lambda path: "other" if path.parent.name == "checkpoint-3" else "h")
        assert "it was not read back as it was written: a.txt is damaged" in str(make(tmp_path, 3))
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2", "damaged-checkpoint-3"]
    make(tmp_path, 3)
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-3"], "the run has got past it"


@pytest.mark.parametrize("same", [True, False])
def test_a_write_that_fails_leaves_what_was_there(tmp_path, same):
    make(tmp_path, 1)

    def full(staging: Path) -> Failure | None:
        (staging / "a.txt").write_text("half")
        return attempted(lambda: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))

    assert saves.store(tmp_path, f"checkpoint-{1 if same else 2}", full, {}) == "[Errno 28] No space left on device"
    assert names(tmp_path) == ["checkpoint-1"]
    assert saves.problem(tmp_path / "checkpoint-1") is None
    with pytest.raises(RuntimeError, match="saving failed on rank 0: KeyError"):
        saves.store(tmp_path, "checkpoint-3", lambda staging: attempted(lambda: {}["a mistake of ours"]), {})


@pytest.mark.parametrize("call", ["rename", "fsync"])
def test_a_step_of_the_commit_that_fails_leaves_what_was_there(tmp_path, monkeypatch, call):
    """The save of one name again: the former steps aside for it, and comes back."""
    make(tmp_path, 1)
    real, made = getattr(os, call), []

    def failing(*arguments):
        made.append(arguments)
        if (call == "rename" and Path(arguments[0]).name.startswith(saves.STAGING)) or (call == "fsync" and (tmp_path / "checkpoint-1" / "new").exists()):
            raise OSError(errno.EIO, "Input/output error")
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing)
        why = saves.store(tmp_path, "checkpoint-1", lambda staging: attempted(lambda: (staging / "new").write_text("")), {})
    assert made
    assert "Input/output error" in str(why)
    assert names(tmp_path) == ["checkpoint-1"]
    assert names(tmp_path / "checkpoint-1") == ["a.txt", saves.SEAL]


@pytest.mark.parametrize("damaged", [True, False])
def test_killed_between_the_former_and_the_new_one_of_a_name(tmp_path, damaged):
    make(tmp_path, 1, "former")
    (tmp_path / "checkpoint-1").rename(tmp_path / "kept")
    make(tmp_path, 1, "new")
    (tmp_path / "kept").rename(tmp_path / f"{saves.FORMER}checkpoint-1")
    if damaged:
        flip(tmp_path / "checkpoint-1" / "a.txt")
    saves.settle_all(tmp_path)
    assert (tmp_path / "checkpoint-1" / "a.txt").read_text() == ("former 1" if damaged else "new 1")
    assert names(tmp_path) == ["checkpoint-1", *(["damaged-checkpoint-1"] if damaged else [])]
    (tmp_path / "checkpoint-1").rename(tmp_path / f"{saves.FORMER}checkpoint-1")
    saves.settle_all(tmp_path)
    assert saves.newest_verified(tmp_path) == tmp_path / "checkpoint-1"


def test_every_byte_of_a_save_counts(tmp_path):
    make(tmp_path, 1)
    save = tmp_path / "checkpoint-1"
    for file in save.iterdir():
        before = file.read_bytes()
        for place in range(len(before)):
            file.write_bytes(before[:place] + bytes([before[place] ^ 1]) + before[place + 1 :])
            assert saves.problem(save) is not None, (file.name, place)
        file.write_bytes(before)
    assert saves.problem(save) is None
    (save / "more").write_text("")
    assert saves.problem(save) == "its files differ from its list: more"
    (save / "more").unlink()
    (save / "a.txt").rename(tmp_path / "elsewhere")
    (save / "a.txt").symlink_to(tmp_path / "elsewhere")
    assert saves.problem(save) == "a.txt is damaged"


def test_a_save_whose_list_is_of_before_still_verifies(tmp_path):
    make(tmp_path, 1)
    save = tmp_path / "checkpoint-1"
    (save / saves.SEAL).write_text(json.dumps(saves.read_seal(save)["files"]))
    assert saves.problem(save) is None
    flip(save / "a.txt")
    assert saves.problem(save) == "a.txt is damaged"


@pytest.mark.parametrize(
    ("name", "number"),
    [("rng_state_1.pth", 1), ("running-1.json", 1), ("optimizer-00001.safetensors", 1), ("global_step3/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt", 1),
     ("global_step3/mp_rank_00_model_states.pt", 0), ("optimizer.pt", 0), ("model-00001-of-00002.safetensors", 0), ("rng_state_7.pth", 0)],
)  # fmt: skip
def test_the_process_that_writes_a_file(name, number):
    assert saves.owner(name, 2) == number


def test_a_full_disk_is_said_once_and_so_is_its_end(capsys):
    warnings = saves.Warnings("sft")
    for step in (1, 2, 3):
        assert not warnings.outcome(f"the save of step {step}", "no space", "checkpoint-9" if step > 1 else None)
    assert warnings.outcome("the save of step 4", None)
    assert warnings.outcome("the save of step 5", None)
    assert capsys.readouterr().out.splitlines() == [
        "warning: sft: the save of step 1 could not be written (no space); training goes on and there is no save to resume from yet. Make room: every save "
        "that is due is tried again, and nothing more is said until one succeeds",
        "sft: the save of step 4 is written; 3 before it could not be",
    ]


def test_lines_that_do_not_fit_wait_for_room(tmp_path, monkeypatch, capsys):
    lines = Appended(tmp_path / "metrics.jsonl")
    lines.add("one\n")
    real = Path.open

    def full(self, mode="r", **keywords):
        with real(self, mode, **keywords) as stream:
            stream.write("tor")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        lines.add("two\n")
        lines.add("three\n")
    assert lines.path.read_text() == "one\n", "no half of a line"
    lines.flush()
    assert lines.path.read_text() == "one\ntwo\nthree\n"
    assert capsys.readouterr().out.count("can't be written") == 1


def test_a_line_for_a_full_disk_is_lost_and_the_run_goes_on(monkeypatch):
    class Full(io.StringIO):
        def flush(self) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    full = Full()
    monkeypatch.setattr("sys.stdout", full)
    say("a line")
    assert full.getvalue() == "a line\n", "it was tried"


NOW = {"data": {"train": "a"}, "tokenizer": "t", "template": "c", "steps": 10, "processes": 2, "zero_stage": 0, "parents": ["p"],
       "config": {"train.learning_rate": 0.1, "beta": 1.0, "lora": None, "data": [{"path": "x"}]}}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "line", "allowed", "not_allowed"),
    [
        ({"data": {"train": "b"}}, "data.train: 'a' → 'b'", ["data"], ["config"]),
        ({"config": NOW["config"] | {"data": []}}, "data: [{'path': 'x'}] → []", ["data", "config"], ["schedule"]),
        ({"template": "d"}, "template: 'c' → 'd'", ["template"], ["tokenizer", "config"]),
        ({"steps": 20}, "steps: 10 → 20", ["schedule"], ["data"]),
        ({"processes": 1}, "processes: 2 → 1", ["processes"], ["config"]),
        ({"zero_stage": 2}, "zero_stage: 0 → 2 (the machine", [], ["processes", "config"]),
        ({"config": NOW["config"] | {"lora.rank": 4}}, "lora.rank: null → 4", ["config"], ["schedule"]),
        ({"config": NOW["config"] | {"train.learning_rate": 0.0}}, "train.learning_rate: 0.1 → 0.0", ["schedule"], ["data", "beta"]),
    ],
)
def test_the_diff_and_what_allows_it(change, line, allowed, not_allowed):
    found = changes.changes(NOW, NOW | change)
    assert [str(one)[: len(line)] for one in found] == [line]
    for key in allowed:
        assert not changes.refused(found, [key])
    for key in not_allowed:
        assert changes.refused(found, [key]) == found
    assert line in changes.refusal(Path("resume"), "checkpoint-1", found)


@pytest.mark.parametrize(
    ("changed", "keys"),
    [
        ({"train.learning_rate": 1.0}, "train.learning_rate"),
        ({"train.learning_rate": 1.0, "beta": 2.0}, "train.learning_rate beta"),
        ({"lora.rank": 4}, "lora"),  # of a section that is chosen as a whole
        ({"beta": 2.0, "lora.rank": 1, "a": 1, "b": 1, "c": 1}, "config"),
    ],
)
def test_a_refusal_names_what_allows_as_little_as_can_be(changed, keys):
    """It named `schedule`, with which number of steps and batch size may change too."""
    fields = ["train.learning_rate", "beta", "lora", "a", "b", "c"]
    found = changes.changes(NOW, NOW | {"config": NOW["config"] | changed})
    said = changes.refusal(Path("resume"), "checkpoint-1", found, fields)
    assert f"allow it with {' '.join(f'--allow-changed {key}' for key in keys.split())} (or allow_changed: [{keys.replace(' ', ', ')}])" in said
    assert not changes.refused(found, keys.split())


def test_more_steps_are_the_schedules_and_the_fields_that_make_them_need_not_be_named():
    found = changes.changes(NOW, NOW | {"steps": 20, "config": NOW["config"] | {"train.learning_rate": 1.0}})
    assert "allow it with --allow-changed schedule (or" in changes.refusal(Path("resume"), "checkpoint-1", found, ["train.learning_rate"])


def test_under_zero_another_number_of_processes_can_not_be_allowed():
    now = NOW | {"zero_stage": 3}
    found = changes.changes(now, now | {"processes": 4})
    assert changes.refused(found, ["processes", "config"]) == found
    assert "can't be cut anew" in changes.refusal(Path("resume"), "checkpoint-1", found)
    assert "--allow-changed" not in changes.refusal(Path("resume"), "checkpoint-1", found)


@pytest.mark.parametrize(("fault", "saved"), [(errno.EINVAL, True), (errno.EIO, False)])
def test_a_file_system_whose_folders_cannot_be_synced(tmp_path, monkeypatch, fault, saved):
    real = os.fsync

    def refuse(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(fault, os.strerror(fault))
        real(handle)

    monkeypatch.setattr(os, "fsync", refuse)
    assert (make(tmp_path, 1) is None) == saved
