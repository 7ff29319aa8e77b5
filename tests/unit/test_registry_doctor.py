"""`align registry doctor`: every probe can fail, says what that means, and leaves nothing behind."""

from __future__ import annotations

import errno
import json
import os

import pytest

from launch.cli import main
from stages.registry import probe


def run(capsys, *words):
    code = main(["registry", "doctor", *words])
    out, err = capsys.readouterr()
    return code, out, err


def test_a_disk_that_will_do(tmp_path, capsys):
    code, out, _ = run(capsys, str(tmp_path / "not" / "there" / "yet"), "--json")
    facts = json.loads(out)
    assert (code, facts["fit"], os.listdir(tmp_path)) == (0, True, [])
    assert [item["name"] for item in facts["probes"] if item["needed"]] == ["rename of a folder", "hard link", "exclusive create", "fsync of a file", "fsync of a folder"]
    assert all(item["works"] for item in facts["probes"] if item["needed"])
    assert "a registry can be kept here" in run(capsys, str(tmp_path))[1]


def refuse(number):
    def call(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    return call


def overwrite(source, target, **_):
    with open(target, "wb") as stream:
        stream.write(b"copied")


@pytest.mark.parametrize(
    ("name", "operation", "failing"),
    [
        ("rename of a folder", "rename", refuse(errno.EXDEV)),
        ("rename of a folder", "rename", lambda source, target: None),
        ("hard link", "link", refuse(errno.EPERM)),
        ("hard link", "link", overwrite),  # as some network file systems do: a copy
        ("fsync of a file", "fsync", refuse(errno.EINVAL)),
        ("fsync of a folder", "fsync", refuse(errno.EINVAL)),
    ],
)
def test_a_file_system_that_lacks_something_is_told_apart(tmp_path, capsys, monkeypatch, name, operation, failing):
    with monkeypatch.context() as patch:
        patch.setattr(os, operation, failing)
        code, out, _ = run(capsys, str(tmp_path), "--json")
    found = {item["name"]: item for item in json.loads(out)["probes"]}
    assert (code, found[name]["works"], os.listdir(tmp_path)) == (1, False, [])
    assert found[name]["problem"]
    assert "keep the registry elsewhere" in found[name]["means"]


def test_a_create_that_is_not_exclusive_and_a_reflink_that_is_missing(tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(probe, "_write", lambda path, content=b"": (path.write_bytes(content) and path) or path)
        patch.setattr(probe, "reflink", lambda source, target: False)
        code, out, _ = run(capsys, str(tmp_path))
    assert code == 1
    assert "exclusive create    FAILS" in out
    assert "identical files are stored once as hard links instead" in out
    assert "a registry can not be kept here" in out


def test_a_folder_that_cannot_be_written_is_a_users_error(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    code, _, err = run(capsys, str(tmp_path / "file"))
    assert (code, "can't be written" in err) == (2, True)
