"""The resumable state of published runs: kept apart from the model, collected by a rule of its own, written out again."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest

from configs.errors import UserError
from launch.cli import main
from stages.registry import Registry, gc, resumable
from stages.registry.gc import Rules
from stages.training import saves
from stages.training.publish import keep_resume
from tests.unit.registry_samples import flip_bit, publish


@pytest.fixture
def registry(tmp_path, monkeypatch):
    monkeypatch.setattr("stages.registry.provenance._git", lambda *args: None)
    return Registry(tmp_path / "registry")


def save_in(folder, number=40):
    """A sealed save as a stage makes it."""

    def write(place):
        (place / "inner").mkdir()
        (place / "optimizer.pt").write_bytes(b"state" * 1000)
        (place / "inner" / "more.bin").write_bytes(b"x")

    saves.store_alone(folder, f"checkpoint-{number}", write, {"data": "abc"})
    return folder / f"checkpoint-{number}"


def kept(registry):
    return [item.ref for item in resumable.kept(registry)]


def test_a_state_is_kept_beside_its_checkpoint_which_stays_as_it_was_and_written_out_again(registry, tmp_path, capsys):
    checkpoint = publish(registry)
    save_in(tmp_path / "out" / "resume", 20)
    newest = save_in(tmp_path / "out" / "resume", 40)
    keep_resume(registry, checkpoint, tmp_path / "out" / "resume")
    assert "kept checkpoint-40" in capsys.readouterr().out
    assert registry.verify("sft/demo", deep=True) == []
    assert [item.ref for item in registry.list()] == ["sft/demo@1"]
    code = main(["registry", "resume", "sft/demo", str(tmp_path / "again"), "--registry", str(registry.root), "--json"])
    assert (code, json.loads(capsys.readouterr().out)["save"]) == (0, str(tmp_path / "again" / "resume" / "checkpoint-40"))
    (save,) = saves.saves(tmp_path / "again" / "resume")
    assert saves.problem(save) is None
    assert saves.read_seal(save) == saves.read_seal(newest)
    assert os.access(save / "optimizer.pt", os.W_OK)
    assert sorted(os.listdir(tmp_path / "again")) == ["resume"]
    with pytest.raises(UserError, match="holds saves already"):
        resumable.restore(registry, "sft/demo", tmp_path / "again")
    flip_bit(registry.root / "resume/checkpoints" / checkpoint.id / "state/checkpoint-40/optimizer.pt", 9)
    with pytest.raises(UserError, match=r"is damaged: state/checkpoint-40/optimizer\.pt: its content changed"):
        resumable.restore(registry, "sft/demo", tmp_path / "third")
    publish(registry)
    with pytest.raises(UserError, match=r"no resumable state of sft/demo@2 is kept .*there is: sft/demo@1"):
        resumable.restore(registry, "sft/demo", tmp_path / "third")
    assert not (tmp_path / "third").exists()


def test_a_run_without_a_save_or_without_room_is_published_all_the_same(registry, tmp_path, capsys, monkeypatch):
    checkpoint = publish(registry)
    keep_resume(registry, checkpoint, tmp_path / "none")
    assert "holds no sound save" in capsys.readouterr().out
    save_in(tmp_path / "resume")
    flip_bit(tmp_path / "resume" / "checkpoint-40" / "optimizer.pt", 3)
    keep_resume(registry, checkpoint, tmp_path / "resume")
    assert "holds no sound save" in capsys.readouterr().out
    save_in(tmp_path / "other")
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=0))
        keep_resume(registry, checkpoint, tmp_path / "other")
    assert "warning: keep_resume: " in capsys.readouterr().out
    assert kept(registry) == []
    assert os.listdir(registry.root / "resume" / "checkpoints") == []


def test_states_go_before_models_and_by_a_rule_of_their_own(registry, tmp_path):
    for number in range(4):
        resumable.keep(registry, publish(registry), save_in(tmp_path / str(number)))
    registry.set_alias("sft/demo", "production", "sft/demo@1")
    done = gc.make_plan(registry, Rules(keep=2, keep_resume=1))
    assert ([item.ref for item in done.going], [item.ref for item in done.resume]) == (["sft/demo@2"], ["sft/demo@1", "sft/demo@2", "sft/demo@3"])
    gc.apply(registry, done)
    assert ([item.version for item in registry.list()], kept(registry)) == ([1, 3, 4], ["sft/demo@4"])
    assert resumable.restore(registry, "sft/demo@1", tmp_path / "back").name == "checkpoint-40"  # from the trash
    assert kept(registry) == ["sft/demo@1", "sft/demo@4"]
    gc.apply(registry, gc.make_plan(registry, Rules(keep=2, keep_resume=0), at=datetime.now(UTC) + timedelta(days=8)))
    assert kept(registry) == []
    assert registry.verify("sft/demo", deep=True) == []


def test_what_a_killed_keeper_left_is_no_state(registry, tmp_path, monkeypatch):
    checkpoint = publish(registry)

    def killed(source, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(resumable, "durable_move", killed)
        with pytest.raises(KeyboardInterrupt):
            resumable.keep(registry, checkpoint, save_in(tmp_path / "resume"))
    assert kept(registry) == []
    assert gc.make_plan(registry, Rules()).resume == []
