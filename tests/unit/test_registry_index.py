"""The index of a large registry: never stale, never the truth, and no worse than absent when it is broken."""

import json
import os
import shutil
import sqlite3

import pytest

from configs.errors import UserError
from stages.registry import Parent, Registry, index, place
from stages.registry.sealing import seal
from tests.reliability import many
from tests.unit.registry_samples import flip_bit, publish, run_together

COUNT = 12


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """Large enough to be indexed."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(index, "SMALL", 5)
    made = Registry(tmp_path / "registry")
    many.fill(made, COUNT)
    return made


@pytest.fixture
def reads(monkeypatch):
    """The ids whose manifests were read."""
    seen = []
    real = index.read_checkpoint
    monkeypatch.setattr(index, "read_checkpoint", lambda path: seen.append(path.name) or real(path))
    return seen


def refs(registry):
    return [item.ref for item in registry.list()]


def test_the_second_list_reads_no_manifest_and_says_the_same(registry, reads):
    first = registry.list()
    assert len(first) == COUNT
    assert len(reads) == COUNT
    del reads[:]
    again = registry.list()
    assert again == first
    facts = [(item.ref, item.id, item.path, item.size, item.model_dir, item.manifest["created"], item.manifest["parents"]) for item in again]
    assert reads == []
    whole = [(item.ref, item.id, item.path, sum(entry["size"] for entry in item.manifest["files"].values()), item.model_dir) for item in first]
    assert [fact[:5] for fact in facts] == whole
    assert [dict(item.manifest) for item in again] == [dict(item.manifest) for item in first]
    assert again[0].info("metrics") == {"loss": 1.0}
    assert {item.ref for item in registry.list("sft", "real")} == {"sft/real@1"}
    assert refs(registry) == sorted(refs(registry), key=lambda ref: (ref.partition("@")[0], int(ref.partition("@")[2])))


def test_what_was_published_or_removed_meanwhile_is_seen_and_nothing_else_is_read(registry, reads):
    before = registry.list()
    added = publish(Registry(registry.root), "dpo/new")  # another process has its own Registry and the same index
    del reads[:]
    assert {item.id for item in registry.list()} == {item.id for item in before} | {added.id}
    assert reads == [added.id]
    shutil.rmtree(added.path)
    assert registry.list() == before
    shutil.rmtree(registry.root / "checkpoints")
    assert registry.list() == []


def _text(file):
    file.write_text("no database")


def _cut(file):
    os.truncate(file, file.stat().st_size // 2)


def _flipped(file):
    with sqlite3.connect(file) as database:
        (body,) = database.execute("SELECT body FROM listing").fetchone()
        database.execute("UPDATE listing SET body = ?", (body.replace(b"name-003", b"name-004"),))


def _other_tables(file):
    with sqlite3.connect(file) as database:
        database.execute("DROP TABLE listing")
        database.execute("DROP TABLE files")


def _scrambled(file):
    content = bytearray(file.read_bytes())
    content[100:] = bytes(len(content) - 100)
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [_text, _cut, _flipped, _other_tables, _scrambled, os.unlink])
def test_a_broken_index_is_rebuilt_silently(registry, reads, damage):
    before = registry.list()
    file = place.index_file(registry.root)
    damage(file)
    assert registry.list() == before
    del reads[:]
    assert registry.list() == before
    assert reads == []  # it was rebuilt


def test_where_no_index_can_be_kept_the_manifests_are_read(registry, reads, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(registry.list()) == len(registry.list()) == COUNT
    assert len(reads) == 2 * COUNT
    assert publish(registry).version == 1


def test_a_writer_that_holds_the_index_delays_nobody_for_long(registry, reads, monkeypatch):
    registry.list()
    monkeypatch.setattr(index, "_LOCKED", 0.05)
    holder = sqlite3.connect(place.index_file(registry.root), isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    assert len(registry.list()) == COUNT
    holder.execute("ROLLBACK")
    holder.close()
    del reads[:]
    assert len(registry.list()) == COUNT
    assert reads == []


def test_a_manifest_damaged_after_it_was_indexed_is_found(registry):
    victim = registry.list()[3]
    flip_bit(victim.path / "manifest.json", 40)
    with pytest.raises(UserError, match="damaged"):
        registry.resolve(victim.ref)
    with pytest.raises(UserError, match="damaged"):
        registry.list()[3].info("config")
    assert list(registry.damaged()) == [victim.id]
    assert victim.id not in {item.id for item in registry.list()}  # known from then on
    flip_bit(victim.path / "manifest.json", 40)
    assert registry.damaged() == {}
    assert victim in registry.list()


def test_publish_and_resolve_read_the_manifests_they_are_about_and_no_others(registry, reads, monkeypatch):
    import stages.registry.integrity as integrity
    import stages.registry.registry as registry_module

    parent = registry.resolve("sft/real")
    opened = []
    real = integrity.unseal
    monkeypatch.setattr(integrity, "unseal", lambda content: opened.append(json.loads(content)["id"]) or real(content))
    monkeypatch.setattr(registry_module, "read_checkpoint", integrity.read_checkpoint)
    assert registry.resolve("sft/real@1").id == registry.resolve("sft/real").id == parent.id
    assert set(opened) == {parent.id}
    child = publish(registry, "dpo/child", parents=[Parent.of(parent, "init_from")])
    again = publish(registry, "dpo/child")
    assert set(opened) == {parent.id, child.id, again.id}
    assert again.version == 2


def test_names_come_from_folder_names_alone(registry, reads):
    assert registry.families() == sorted({item.ref.partition("@")[0] for item in registry.list()})
    del reads[:]
    registry.families()
    assert reads == []
    shutil.rmtree(registry.root / "versions")
    assert "sft/real" in registry.families()


def test_files_anywhere_are_found_through_the_index(registry):
    real = registry.resolve("sft/real")
    registry.list()
    stranger = publish(registry, "ppo/stranger")
    name = "model/model.safetensors"
    same = (stranger.path / name).stat().st_ino == (real.path / name).stat().st_ino
    assert same or "reflink_of" in stranger.manifest["files"][name]
    assert registry.verify(stranger.id, deep=True) == []


def test_claims_that_are_lost_in_part_are_no_reason_to_overlook_a_version(registry):
    for _ in range(3):
        publish(registry)
    folder = registry.root / "versions" / "sft" / "demo"
    (folder / "00000001.json").unlink()
    assert registry.resolve("sft/demo").version == 3
    assert registry.resolve("sft/demo@1").version == 1
    (folder / "00000003.json").write_bytes(seal({"id": "nonsense"}))
    assert registry.resolve("sft/demo@3").version == 3


def test_many_processes_use_one_index(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    registry = Registry(tmp_path / "registry")
    publish(registry)
    script = f"""
from stages.registry import Registry, index
from tests.unit.registry_samples import publish
index.SMALL = 1
registry = Registry({str(registry.root)!r})
for turn in range(6):
    mine = publish(registry, f"sft/n{{sys.argv[1]}}", value=turn % 2).id
    assert mine in {{item.id for item in registry.list()}}
print(len(registry.list()))
"""
    assert max(map(int, run_together(script, 4, tmp_path))) == 25
    monkeypatch.setattr(index, "SMALL", 1)
    assert len(registry.list()) == 25
    assert all(registry.verify(item.id, deep=True) == [] for item in registry.list())


def test_the_cache_lies_on_a_disk_of_this_machine_and_nobody_elses_folder_is_used(tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert place.cache_folder() == tmp_path / ".cache" / "align-stack"
    monkeypatch.setattr(place, "on_network", lambda path: True)
    monkeypatch.setattr(place.tempfile, "gettempdir", lambda: str(tmp_path))
    shared = tmp_path / f"align-stack-{os.geteuid()}"
    assert place.cache_folder() == shared
    shared.mkdir(mode=0o777)
    shared.chmod(0o777)  # anybody may write it
    assert place.cache_folder() != shared
    shared.rmdir()
    shared.symlink_to(tmp_path)
    assert place.cache_folder() != shared


def test_another_registry_at_the_same_path_has_another_index(registry, tmp_path):
    before = place.index_file(registry.root)
    registry.root.rename(tmp_path / "old")
    assert place.index_file(Registry(tmp_path / "registry").root) != before
