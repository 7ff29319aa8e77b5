"""Identical files are stored once, and no checkpoint suffers from another's end, damage or owner."""

import errno
import os
import shutil

import pytest

from configs.errors import UserError
from stages.registry import Parent, Registry, sharing, storage
from stages.registry.storage import protect
from tests.unit.registry_samples import flip_bit, publish

FILES = ["model/config.json", "model/extra/notes.txt", "model/model.safetensors"]


@pytest.fixture
def registry(tmp_path):
    return Registry(tmp_path / "registry")


def inodes(checkpoint):
    return [(checkpoint.path / name).stat().st_ino for name in FILES]


def hardlinks_only(monkeypatch):
    monkeypatch.setattr(sharing, "reflink", lambda source, target: False)


def test_files_of_a_parent_of_an_earlier_version_and_of_any_checkpoint_are_stored_once(registry, monkeypatch):
    hardlinks_only(monkeypatch)
    first = publish(registry)
    again, child, stranger = publish(registry), publish(registry, "dpo/x", parents=[Parent.of(first, "init_from")]), publish(registry, "ppo/y")
    assert inodes(first) == inodes(again) == inodes(child) == inodes(stranger)
    other = publish(registry, "sft/demo", value=2.0)
    assert [a == b for a, b in zip(inodes(first), inodes(other), strict=True)] == [False, True, False]
    assert all(registry.verify(item.id, deep=True) == [] for item in registry.list())
    assert not [name for _, _, names in os.walk(registry.root) for name in names if name.startswith(".")]


def test_a_parent_is_asked_before_the_same_name_and_that_before_all_others(registry, monkeypatch):
    hardlinks_only(monkeypatch)
    monkeypatch.setattr(sharing, "hardlink", lambda source, target: False)  # three copies of the same files
    elsewhere, parent, version = publish(registry, "sft/elsewhere"), publish(registry, "sft/parent"), publish(registry)
    monkeypatch.undo()
    hardlinks_only(monkeypatch)
    assert inodes(publish(registry, parents=[Parent.of(parent, "init_from")])) == inodes(parent)
    other = publish(registry, "sft/fourth", parents=[Parent.external("org/x", "init_from")])
    assert inodes(other) in (inodes(elsewhere), inodes(parent), inodes(version))


def test_removing_one_checkpoint_leaves_the_other_whole(registry):
    first, second = publish(registry), publish(registry)
    shutil.rmtree(first.path)
    assert registry.verify(second.id, deep=True) == []
    third = publish(registry)
    shutil.rmtree(second.path)
    assert registry.verify(third.id, deep=True) == []


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_never_shared_and_costs_the_new_one_nothing(registry, name):
    damaged = publish(registry)
    flip_bit(damaged.path / name, -1)
    fresh = publish(registry)
    assert registry.verify(fresh.id, deep=True) == []
    assert registry.verify(damaged.id, deep=True)
    shared = [a == b for a, b in zip(inodes(damaged), inodes(fresh), strict=True)]
    assert shared[FILES.index(name)] is False


@pytest.mark.parametrize("strange", ["gone", "link", "folder"])
def test_what_is_no_plain_file_any_more_is_never_shared(registry, strange):
    odd = publish(registry)
    file = odd.path / FILES[2]
    content = file.read_bytes()
    file.unlink()
    (registry.root / "outside").write_bytes(content)
    if strange == "link":
        file.symlink_to(registry.root / "outside")
    elif strange == "folder":
        file.mkdir()
    fresh = publish(registry)
    assert registry.verify(fresh.id, deep=True) == []
    assert not (fresh.path / FILES[2]).is_symlink()
    assert (registry.root / "outside").stat().st_nlink == 1


@pytest.mark.parametrize("refusal", [errno.EMLINK, errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.ENOENT])
def test_where_the_system_refuses_to_share_a_copy_is_kept(registry, monkeypatch, refusal):
    first = publish(registry)
    real = os.link

    def refuse(source, target, **rest):
        if "/checkpoints/" in str(target):
            raise OSError(refusal, os.strerror(refusal))
        real(source, target, **rest)

    monkeypatch.setattr(os, "link", refuse)
    second = publish(registry)
    assert registry.verify(second.id, deep=True) == []
    assert not set(inodes(first)) & set(inodes(second))


def test_a_file_that_cannot_be_protected_is_not_shared(registry, monkeypatch):
    first = publish(registry)
    hardlinks_only(monkeypatch)
    for name in FILES:
        (first.path / name).chmod(0o644)  # as an older version left them
    real = os.chmod

    def not_the_owner(path, mode, **rest):
        if os.path.basename(path).startswith(".shared"):
            raise PermissionError(errno.EPERM, "not the owner")
        real(path, mode, **rest)

    monkeypatch.setattr(os, "chmod", not_the_owner)
    second = publish(registry)
    assert not set(inodes(first)) & set(inodes(second))
    shutil.rmtree(second.path)
    monkeypatch.undo()
    hardlinks_only(monkeypatch)
    assert inodes(publish(registry)) == inodes(first)
    assert [oct((first.path / name).stat().st_mode & 0o777) for name in FILES] == ["0o444"] * 3


@pytest.mark.parametrize(("folder", "file"), [(0o755, 0o444), (0o750, 0o440), (0o700, 0o400)])
def test_who_may_read_the_folder_may_read_the_weights(tmp_path, folder, file):
    """safetensors makes its files for their owner alone; a server under another account must load a published model."""
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"")
    weights.chmod(0o600)
    tmp_path.chmod(folder)
    protect(weights)
    assert oct(weights.stat().st_mode & 0o777) == oct(file)


def test_a_reflink_is_recorded_and_verified(registry, monkeypatch):
    def cloned(source, target):  # what a file system with reflinks does, as far as a reader can tell
        shutil.copyfile(source, target)
        return True

    monkeypatch.setattr(sharing, "reflink", cloned)
    first, second = publish(registry), publish(registry)
    assert [entry.get("reflink_of") for entry in second.manifest["files"].values()] == [f"{first.id}/{name}" for name in FILES]
    assert registry.verify(second.id, deep=True) == []

    def torn(source, target):
        target.write_bytes(b"x" * source.stat().st_size)
        return True

    monkeypatch.setattr(sharing, "reflink", torn)
    third = publish(registry)
    assert registry.verify(third.id, deep=True) == []
    assert not [entry for entry in third.manifest["files"].values() if "reflink_of" in entry]


def test_reflink_and_hard_link_on_this_file_system(tmp_path):
    (tmp_path / "a").write_bytes(b"content")
    if storage.reflink(tmp_path / "a", tmp_path / "b"):
        assert (tmp_path / "b").read_bytes() == b"content"
        assert (tmp_path / "b").stat().st_ino != (tmp_path / "a").stat().st_ino
    else:
        assert not (tmp_path / "b").exists()
    assert storage.hardlink(tmp_path / "a", tmp_path / "c")
    storage.replace(tmp_path / "c", tmp_path / "a")  # two names of one file: rename(2) alone would keep both
    assert not (tmp_path / "c").exists()
    assert not storage.reflink(tmp_path / "absent", tmp_path / "d")
    assert not storage.hardlink(tmp_path / "absent", tmp_path / "d")


def test_published_files_are_read_only(registry):
    checkpoint = publish(registry)
    assert {(checkpoint.path / name).stat().st_mode & 0o222 for name in FILES} == {0}


def test_a_fault_of_the_disk_while_sharing_is_told(registry, monkeypatch):
    publish(registry)

    def broken(source, target, **rest):
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(sharing, "hardlink", broken)
    hardlinks_only(monkeypatch)
    with pytest.raises(UserError, match="input/output error"):
        publish(registry)
    assert len(registry.list()) == 1


@pytest.mark.parametrize("refusal", [errno.EPERM, errno.ENOTSUP, errno.ENOSYS])
def test_where_rights_cannot_be_changed_a_model_is_published_all_the_same(registry, monkeypatch, refusal):
    """Mounts of buckets and Windows shares: it cost a finished training its model."""

    def refuse(path, mode, **rest):
        raise OSError(refusal, os.strerror(refusal))

    monkeypatch.setattr(os, "chmod", refuse)
    first, second = publish(registry), publish(registry)
    assert registry.verify(second.id, deep=True) == []
    assert not set(inodes(first)) & set(inodes(second))
