"""Damage of every kind is found, and a damaged checkpoint is never used or silently passed over."""

import os
import shutil

import pytest

from configs.errors import UserError
from stages.registry import Problem, Registry
from stages.registry.sealing import canonical, plain, seal, unseal
from tests.unit.registry_samples import flip_bit, publish


@pytest.fixture
def registry(tmp_path):
    return Registry(tmp_path / "registry")


def test_a_flipped_bit_in_any_file_is_found_by_the_deep_check(registry):
    checkpoint = publish(registry)
    assert registry.verify("sft/demo", deep=True) == []
    for name in checkpoint.manifest["files"]:
        for position in (0, (checkpoint.path / name).stat().st_size - 1):
            flip_bit(checkpoint.path / name, position)
            assert registry.verify("sft/demo") == []  # same files, same sizes
            assert registry.verify("sft/demo", deep=True) == [Problem(name, "its content changed since it was published")]
            flip_bit(checkpoint.path / name, position)
    assert registry.verify("sft/demo", deep=True) == []


def test_a_flipped_bit_anywhere_in_the_manifest_is_found_by_the_quick_check(registry):
    manifest = publish(registry).path / "manifest.json"
    for position in range(manifest.stat().st_size - 1):  # the last byte is a line feed
        flip_bit(manifest, position)
        problems = registry.verify("sft/demo")
        assert [problem.file for problem in problems] == ["manifest.json"], position
        flip_bit(manifest, position)
    assert registry.verify("sft/demo") == []


def _truncate(path):
    file = path / "model/model.safetensors"
    head = file.read_bytes()[:50]
    file.unlink()  # the sound checkpoint holds the same file under its own name
    file.write_bytes(head)


def _delete(path):
    (path / "model/model.safetensors").unlink()


def _add(path):
    (path / "model/extra/new.json").write_text("{}")


def _beside(path):
    (path / "stray").touch()


def _link(path):
    target = path / "model/config.json"
    size = target.stat().st_size
    target.unlink()
    target.symlink_to("x" * size)


def _edit(path):
    manifest = path / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"seed":7', '"seed":8'))


def _no_manifest(path):
    (path / "manifest.json").unlink()


def _empty_manifest(path):
    (path / "manifest.json").write_bytes(b"")


def _resealed_without_files(path):
    whole = unseal((path / "manifest.json").read_bytes())
    (path / "manifest.json").write_bytes(seal({key: item for key, item in whole.items() if key not in ("hash", "files")}))


DAMAGE = [
    (_truncate, "model/model.safetensors: has 50 bytes, .* were published"),
    (_delete, "model/model.safetensors: is missing"),
    (_add, "model/extra/new.json: was not part of what was published"),
    (_beside, "stray: was not part"),
    (_link, "model/config.json: is not a plain file"),
    (_edit, "manifest.json: its content does not match the hash"),
    (_no_manifest, "manifest.json: is missing"),
    (_empty_manifest, "manifest.json: not readable as JSON"),
    (_resealed_without_files, "manifest.json: has no usable field 'files'"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE)
def test_a_damaged_newest_version_is_an_error_and_no_reason_to_take_an_older_one(registry, damage, message):
    sound, broken = publish(registry), publish(registry, seed=7)
    damage(broken.path)
    for ref in ("sft/demo", "sft/demo@latest", "sft/demo@2", broken.id):
        with pytest.raises(UserError, match=message) as caught:
            registry.resolve(ref)
        assert f"align registry verify {ref} --deep" in str(caught.value)
        assert registry.verify(ref)
    assert registry.resolve("sft/demo@1").id == sound.id
    with pytest.raises(UserError):
        registry.set_alias("sft/demo", "production", "sft/demo@2")
    assert publish(registry).version == 3  # and nothing is in the way of the next one


def test_a_checkpoint_copied_to_another_id_is_not_taken_for_it(registry):
    checkpoint = publish(registry)
    copy = registry.root / "checkpoints" / "20260101t000000-0123456789ab"
    shutil.copytree(checkpoint.path, copy)
    assert "describes checkpoint" in registry.verify(copy.name)[0].what
    assert [item.id for item in registry.list()] == [checkpoint.id]
    assert list(registry.damaged()) == [copy.name]


def test_an_alias_is_not_moved_to_damaged_weights_and_says_when_its_target_is_gone(registry):
    first, second = publish(registry), publish(registry)
    flip_bit(second.model_dir / "model.safetensors", -1)
    with pytest.raises(UserError, match="is damaged, sft/demo@production was not moved"):
        registry.set_alias("sft/demo", "production", "sft/demo@2")
    registry.set_alias("sft/demo", "production", "sft/demo@1")
    shutil.rmtree(first.path)
    with pytest.raises(UserError, match=f"points at {first.id}, which is not in"):
        registry.resolve("sft/demo@production")


def test_a_damaged_alias_or_result_is_an_error_that_names_the_file(registry):
    checkpoint = publish(registry)
    registry.set_alias("sft/demo", "production", "sft/demo")
    registry.set_alias("sft/demo", "production", "sft/demo")
    flip_bit(registry.root / "aliases/sft/demo/production/00000002.json", 20)
    with pytest.raises(UserError, match=r"production/00000002\.json"):
        registry.resolve("sft/demo@production")
    registry.add_evaluation(checkpoint, {"eval_set": "e", "score": 1})
    flip_bit(registry.root / "evaluations" / checkpoint.id / "00000001.json", 20)
    with pytest.raises(UserError, match=r"00000001\.json"):
        registry.evaluations(checkpoint)


def test_a_registry_that_was_copied_without_its_claims_goes_on_counting(registry):
    publish(registry)
    publish(registry)
    shutil.rmtree(registry.root / "versions")
    assert registry.resolve("sft/demo").version == 2
    assert publish(registry).version == 3


def test_the_number_of_a_deleted_checkpoint_is_not_given_again(registry):
    publish(registry)
    shutil.rmtree(publish(registry).path)
    assert registry.resolve("sft/demo").version == 1
    assert publish(registry).version == 3


def test_canonical_json_is_one_sequence_of_bytes_per_value():
    assert canonical({"b": [1, 2.5], "a": "é"}) == '{"a":"é","b":[1,2.5]}'.encode()
    assert canonical(plain({"x": (1, float("-inf"))}, "info")) == b'{"x":[1,"-inf"]}'
    whole = unseal(seal({"b": 1, "a": 2}))
    assert {key: whole[key] for key in "ab"} == {"a": 2, "b": 1}
    for broken in (b"", b"[]", b"{}", b'{"a":1,"hash":"00"}', b'{"a":NaN,"hash":"00"}', b"\xff"):
        with pytest.raises(ValueError, match=r"JSON|hash"):
            unseal(broken)


def test_large_files_are_hashed_as_small_ones_are(tmp_path, monkeypatch):
    from blake3 import blake3

    from stages.registry import sealing

    monkeypatch.setattr(sealing, "CHUNK", 1000)
    sizes = (0, 1, 999, 1000, 1001, 2000, 5003, 20_000)
    for size in sizes:
        (tmp_path / str(size)).write_bytes(os.urandom(size))
    expected = {tmp_path / str(size): blake3((tmp_path / str(size)).read_bytes()).hexdigest() for size in sizes}
    assert {file: sealing.hash_file(file) for file in expected} == expected
    found = sealing.hash_files({tmp_path / str(size): size for size in sizes} | {tmp_path / "absent": 9000})
    assert isinstance(found.pop(tmp_path / "absent"), FileNotFoundError)
    assert found == expected


def test_hashing_a_small_file_takes_no_more_memory_than_it_needs(tmp_path):
    """Two chunks of zeros for each made a publication of small files three times as slow."""
    import tracemalloc

    from stages.registry import sealing

    (tmp_path / "small").write_bytes(b"x" * 100)
    sealing.hash_file(tmp_path / "small")
    tracemalloc.start()
    sealing.hash_file(tmp_path / "small")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50_000
