"""Every operation of a publication fails once: killed there, or told that the disk is full."""

import errno
import os
import re
import signal

import pytest

from configs.errors import UserError
from stages.registry import Registry
from tests.unit.registry_samples import publish, writer

OPERATIONS = ("mkdir", "open", "fsync", "link", "rename", "unlink")


def interrupt(monkeypatch, at, act):
    """Call `act` in place of the `at`-th operation on the file system; returns the list of operations seen."""
    seen = []

    def guard(name, real):
        def call(*args, **kwargs):
            seen.append(name)
            if len(seen) == at:
                act()
            return real(*args, **kwargs)

        return call

    for name in OPERATIONS:
        monkeypatch.setattr(os, name, guard(name, getattr(os, name)))
    return seen


def killed(at, work) -> bool:
    """Run `work` in a child that is killed at its `at`-th operation; whether it was (False: it finished before)."""
    child = os.fork()
    if child == 0:
        try:
            with pytest.MonkeyPatch.context() as patch:
                interrupt(patch, at, lambda: os.kill(os.getpid(), signal.SIGKILL))
                work()
            os._exit(0)
        finally:
            os._exit(9)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


@pytest.fixture(autouse=True)
def _no_git(monkeypatch):
    """The git commands take most of the time and open no file of the registry."""
    monkeypatch.setattr("stages.registry.provenance._git", lambda *args: None)


def test_a_publisher_killed_anywhere_leaves_nothing_visible_and_nothing_in_the_way(tmp_path):
    registry = Registry(tmp_path / "registry")
    publish(registry)
    visible, point = 1, 0
    while killed(point := point + 1, lambda: publish(registry, value=2.0)):
        there = registry.list()
        assert len(there) in (visible, visible + 1), f"killed at operation {point}"
        assert registry.damaged() == {}
        assert all(registry.verify(item.ref, deep=True) == [] for item in there)
        assert registry.resolve("sft/demo").version == max(item.version for item in there)
        visible = len(there)
    assert point > 25  # mkdir, open, fsync, link and rename were all reached
    after = publish(registry, value=3.0)
    versions = [item.version for item in registry.list()]
    assert versions == sorted(set(versions))
    assert after.version == max(versions)
    assert registry.resolve("sft/demo").id == after.id


def test_only_the_rename_makes_a_checkpoint_visible(tmp_path, monkeypatch):
    registry = Registry(tmp_path / "registry")
    publish(registry)
    with monkeypatch.context() as patch:
        seen = interrupt(patch, 0, lambda: None)
        publish(registry)
    rename = seen.index("rename")
    assert seen.count("rename") == 1
    assert "fsync" in seen[rename + 1 :]
    assert "link" in seen[:rename]
    for point, shown in ((rename + 1, 2), (rename + 2, 3)):  # killed before it, killed right after it
        assert killed(point, lambda: publish(registry))
        assert len(registry.list()) == shown


def test_everything_is_on_the_disk_before_the_rename_and_the_rename_before_the_acknowledgement(tmp_path, monkeypatch):
    registry = Registry(tmp_path / "registry")
    synced, before_rename = [], []
    fsync, rename = os.fsync, os.rename

    def record_fsync(handle):
        synced.append(os.readlink(f"/proc/self/fd/{handle}"))
        fsync(handle)

    def record_rename(source, target):
        before_rename.extend(os.path.relpath(path, source) for path in synced if path.startswith(str(source)))
        synced.clear()
        rename(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "rename", record_rename)
    checkpoint = publish(registry)
    model = ["model/config.json", "model/extra/notes.txt", "model/model.safetensors"]
    assert sorted(before_rename[:3]) == model
    assert before_rename[3:] == ["model/extra", "model", ".", "manifest.json", "."]
    assert synced == [str(checkpoint.path.parent)]


def test_an_alias_is_on_the_disk_before_it_is_acknowledged(tmp_path, monkeypatch):
    registry = Registry(tmp_path / "registry")
    publish(registry)
    synced, fsync, link = [], os.fsync, os.link

    def record_fsync(handle):
        synced.append(os.readlink(f"/proc/self/fd/{handle}").removeprefix(f"{registry.root}/"))
        fsync(handle)

    def record_link(source, target):
        synced.append("link")
        link(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "link", record_link)
    registry.set_alias("sft/demo", "production", "sft/demo")
    new_folders = [str(registry.root), "aliases", "aliases/sft", "aliases/sft/demo"]  # each holds a folder made just now
    assert synced[0] == "checkpoints"  # the target's name, which its publisher may have had no time to sync
    assert synced[1:5] == new_folders
    assert synced[5].startswith("aliases/sft/demo/production/.tmp-")
    assert synced[6:] == ["link", "aliases/sft/demo/production"]


def test_a_registry_whose_creator_was_killed_can_be_started_again(tmp_path):
    point = 0
    while killed(point := point + 1, lambda point=point: Registry(tmp_path / str(point) / "registry")):
        assert publish(Registry(tmp_path / str(point) / "registry")).version == 1
    assert point > 5


def test_an_alias_or_result_whose_writer_was_killed_is_there_whole_or_not_at_all(tmp_path):
    registry = Registry(tmp_path / "registry")
    checkpoint = publish(registry)
    aliases = point = 0
    while killed(point := point + 1, lambda: registry.set_alias("sft/demo", "best-so-far", "sft/demo")):
        history = registry.alias_history("sft/demo", "best-so-far")
        assert len(history) in (aliases, aliases + 1)
        aliases = len(history)
    assert registry.resolve("sft/demo@best-so-far").id == checkpoint.id
    results = point = 0
    while killed(point := point + 1, lambda: registry.add_evaluation(checkpoint, {"eval_set": "e", "metrics": {"score": 1.0}})):
        there = registry.evaluations(checkpoint)
        assert len(there) in (results, results + 1)
        results = len(there)
    assert registry.evaluations(checkpoint)[-1] == {"eval_set": "e", "metrics": {"score": 1.0}}


@pytest.mark.parametrize("fault", [errno.ENOSPC, errno.EACCES, errno.EDQUOT, errno.EROFS, errno.EIO])
def test_a_storage_fault_at_any_operation_is_one_clear_error_and_leaves_no_staging_folder(tmp_path, monkeypatch, fault):
    registry = Registry(tmp_path / "registry")
    publish(registry)

    def fail():
        raise OSError(fault, os.strerror(fault), "/somewhere")

    with monkeypatch.context() as patch:
        seen = interrupt(patch, 0, fail)
        publish(registry)
    visible, rename = 2, seen.index("rename") + 1
    for point in range(1, len(seen) + 1):
        if seen[point - 1] == "unlink":  # of a draft that has done its work: gc removes what stays
            continue
        with monkeypatch.context() as patch:
            interrupt(patch, point, fail)
            with pytest.raises(UserError) as caught:
                publish(registry)
        shown = os.listdir(registry.root / "checkpoints")
        visible += point > rename
        assert len(shown) == visible
        assert not [name for name in shown if name.startswith(".tmp-")]
        told = str(caught.value)
        assert "was published at" in told if point > rename else re.search("publishing sft/demo failed|json was written, but", told)
    assert all(registry.verify(item.ref, deep=True) == [] for item in registry.list())


def test_a_full_disk_while_the_model_is_written_costs_the_save_only(tmp_path):
    registry = Registry(tmp_path / "registry")

    def full(folder):
        writer()(folder)
        raise RuntimeError('I/O error: Os { code: 28, message: "No space left on device" } (os error 28)')

    with pytest.raises(UserError, match="the disk is full"):
        registry.publish("sft", "demo", full)

    def interrupted(folder):
        writer()(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        registry.publish("sft", "demo", interrupted)
    assert os.listdir(registry.root / "checkpoints") == []


def test_too_little_room_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    registry = Registry(tmp_path / "registry")
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 20 * 2**20})())

    def never(folder):
        raise AssertionError("written in spite of too little room")

    with pytest.raises(UserError, match="20 MiB are free and the checkpoint needs about 26 MiB"):
        registry.publish("sft", "demo", never, need_bytes=10 * 2**20)
    assert publish(registry).version == 1  # 16 MiB of reserve and a small model fit


def test_leftovers_of_the_killed_are_ignored(tmp_path):
    registry = Registry(tmp_path / "registry")
    publish(registry)
    left = registry.root / "checkpoints" / ".tmp-20260101t000000-0123456789ab"
    (left / "model").mkdir(parents=True)
    (left / "manifest.json").write_text("{")
    (registry.root / "versions" / "sft" / "demo" / ".tmp-1").write_text("{")
    assert [item.version for item in registry.list()] == [1]
    assert registry.damaged() == {}
    assert publish(registry).version == 2
