"""Publishing: what is recorded, what is refused, and many publishers at once."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from configs.errors import UserError
from stages.registry import Parent, Registry
from stages.registry.sealing import hash_bytes
from tests.unit.registry_samples import ROOT, publish, run_together, writer


@pytest.fixture
def registry(tmp_path):
    return Registry(tmp_path / "registry")


def test_a_checkpoint_records_what_it_is_and_what_it_was_made_from(registry):
    base = Parent.external("org/model", "init_from")
    first = publish(registry, parents=[base], config={"lr": 1e-3}, seed=7, metrics={"loss": float("nan"), "steps": np.int64(3)})
    assert (first.stage, first.name, first.version, first.ref) == ("sft", "demo", 1, "sft/demo@1")
    assert sorted(first.manifest["files"]) == ["model/config.json", "model/extra/notes.txt", "model/model.safetensors"]
    assert first.manifest["files"]["model/extra/notes.txt"] == {"size": 2, "blake3": hash_bytes(b"ok")}
    assert first.manifest["parents"] == [{"role": "init_from", "source": "org/model"}]
    assert first.info("metrics") == {"loss": "nan", "steps": 3}
    assert first.info("seed") == 7
    assert first.info("absent") is None
    assert {"code", "libraries", "python", "hardware", "created"} <= first.manifest.keys()
    assert first.manifest["libraries"]["torch"]
    assert first.manifest["created"].endswith("Z")
    assert (first.model_dir / "config.json").is_file()
    second = publish(registry)
    assert (second.version, second.id != first.id) == (2, True)
    assert [item.ref for item in registry.list()] == ["sft/demo@1", "sft/demo@2"]
    assert registry.list("reward") == []


def test_what_is_recorded_cannot_be_changed_through_the_checkpoint(registry):
    checkpoint = publish(registry, config={"a": 1})
    checkpoint.info("config")["a"] = 2
    assert checkpoint.info("config") == {"a": 1}
    with pytest.raises(TypeError):
        checkpoint.manifest["id"] = "other"


def test_the_code_version_is_the_commit_with_a_flag_for_changes(tmp_path):
    from stages.registry.provenance import code_version

    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()

    assert code_version(tmp_path).keys() == {"version"}
    git("init")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-m", "one")
    assert code_version(tmp_path) | {"version": ""} == {"version": "", "git": git("rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "file").write_text("2")
    assert code_version(tmp_path)["dirty"] is True


def test_an_outside_folder_is_recorded_with_the_digest_of_its_files(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    before = Parent.external(tmp_path / "base", "init_from")
    assert (before.source, Parent.external(str(tmp_path / "base"), "init_from")) == (str(tmp_path / "base"), before)
    (tmp_path / "base" / "config.json").write_text("[]")
    assert Parent.external(tmp_path / "base", "init_from").digest != before.digest
    with pytest.raises(UserError, match="neither a folder that exists nor a hub name"):
        Parent.external("/nowhere/model", "init_from")


@pytest.mark.parametrize("bad", ["", ".", "..", "../x", "a/b", "Demo", "-x", "a b", "x" * 65, "a\n", "é", ".tmp-x"])
def test_names_that_could_leave_the_registry_are_refused(registry, bad):
    with pytest.raises(UserError, match="not a usable name"):
        registry.publish("sft", bad, writer())
    with pytest.raises(UserError, match="not a usable name"):
        registry.publish(bad, "demo", writer())
    with pytest.raises(UserError):
        registry.set_alias("sft/demo", bad, "sft/demo")
    assert sorted(os.listdir(registry.root)) == ["registry.json"]


def _symlink(folder):
    (folder / "model.safetensors").symlink_to("/etc/hostname")


def _folder_link(folder):
    writer()(folder)
    (folder / "more").symlink_to("/etc")


def _pipe(folder):
    os.mkfifo(folder / "pipe")


def _pickle(folder):
    writer()(folder)
    (folder / "training_args.bin").write_bytes(b"x")


def _replaced(folder):
    folder.rmdir()
    folder.symlink_to("/etc")


def _not_finite(folder):
    writer(float("inf"))(folder)


def _torn(folder):
    writer()(folder)
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-1])


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda folder: None, "empty"),
        (_symlink, r"model\.safetensors is a link"),
        (_folder_link, "more is a link"),
        (_pipe, "pipe is a link or special file"),
        (_pickle, r"training_args\.bin may be a pickle"),
        (_replaced, "was replaced"),
        (_not_finite, r"12 of the numbers in tensor 'weight' of model\.safetensors are NaN or infinite"),
        (_torn, "not a whole safetensors file"),
    ],
)
def test_files_that_do_not_belong_in_a_checkpoint_are_refused_and_nothing_stays(registry, write, message):
    with pytest.raises(UserError, match=message):
        registry.publish("sft", "demo", write)
    assert os.listdir(registry.root / "checkpoints") == []
    assert publish(registry).version == 1


def test_the_check_of_the_weights_can_be_left_out(registry):
    assert registry.publish("sft", "demo", _not_finite, check_weights=False).version == 1


def test_info_that_json_cannot_hold_is_refused_before_anything_is_written(registry):
    with pytest.raises(UserError, match=r"info\.config\.model is a object"):
        publish(registry, config={"model": object()})
    assert not (registry.root / "checkpoints").exists()


def test_a_folder_that_is_something_else_is_refused(tmp_path):
    (tmp_path / "photo.jpg").touch()
    with pytest.raises(UserError, match=r"not a registry: it holds 'photo\.jpg'"):
        Registry(tmp_path)
    with pytest.raises(UserError, match="is a file"):
        Registry(tmp_path / "photo.jpg")
    with pytest.raises(UserError, match="no registry here"):
        Registry(tmp_path / "absent", create=False)
    assert os.listdir(tmp_path) == ["photo.jpg"]
    later = Registry(tmp_path / "registry")
    mark = later.root / "registry.json"
    from stages.registry.sealing import seal

    mark.write_bytes(seal({"format": "align-registry", "version": 99}))
    with pytest.raises(UserError, match="format 99"):
        Registry(later.root)
    mark.write_text("{}")
    with pytest.raises(UserError, match=r"registry\.json: carries no hash"):
        Registry(later.root)


def test_eight_publishers_at_once_lose_nothing_and_share_no_version(tmp_path):
    script = f"""
from stages.registry import Registry
from tests.unit.registry_samples import publish
for turn in range(5):
    print(publish(Registry({str(tmp_path / "registry")!r}), value=float(sys.argv[1])).ref)
"""
    told = [line for out in run_together(script, 8, tmp_path) for line in out.split()]
    registry = Registry(tmp_path / "registry", create=False)
    assert sorted(told) == sorted(item.ref for item in registry.list())
    assert [item.version for item in registry.list()] == list(range(1, 41))
    assert all(registry.verify(item.ref, deep=True) == [] for item in registry.list())
    assert not [name for name in os.listdir(registry.root / "checkpoints") if name.startswith(".tmp-")]


def test_reading_the_registry_loads_no_heavy_library():
    script = """
import sys, json
import launch.registry_cli
print(json.dumps(sorted({"blake3", "pydantic", "stages.registry"} & sys.modules.keys())))
import stages.registry
print(json.dumps(sorted({"torch", "transformers", "datasets", "rich", "numpy", "blake3"} & sys.modules.keys())))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    assert [json.loads(line) for line in done.stdout.splitlines()] == [[], []]
