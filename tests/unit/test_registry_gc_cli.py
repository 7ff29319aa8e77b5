"""`align registry gc`, `restore` and `alias`: what is shown, what is done, and how much becomes free."""

import json
from datetime import UTC, datetime, timedelta

import pytest

from stages.registry import Registry, gc, resumable, sharing
from stages.registry.gc import Rules
from tests.unit.registry_samples import publish


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """Where identical files are hard links."""
    monkeypatch.setattr(sharing, "reflink", lambda source, target: False)
    return Registry(tmp_path / "registry")


def frees(align, *words):
    return json.loads(align("gc", *words, "--json")[1])["frees"]


def test_what_others_hold_too_is_not_counted_as_freed(align, registry, tmp_path):
    """All versions are one file under several names: gc counted each of them."""
    whole = publish(registry).size
    for _ in range(3):
        publish(registry)
    assert frees(align, "--keep", "2") == {"now": 0, "when_the_trash_is_emptied": 0}
    odd = publish(registry, value=2.0)
    weights = odd.manifest["files"]["model/model.safetensors"]["size"]
    publish(registry)
    own = whole - odd.manifest["files"]["model/extra/notes.txt"]["size"]  # that one is alike in all of them
    assert frees(align, "--keep", "1") == {"now": 0, "when_the_trash_is_emptied": own}
    assert weights < own < whole
    out = align("gc", "--keep", "1")[1]
    assert f"1 kept, 5 would go to the trash ({5 * whole} B)\nwhen the trash is emptied, {own} B would become free: what others hold too stays" in out
    assert f"{own} B become free" in align("gc", "--keep", "1", "--apply")[1]
    late = gc.make_plan(registry, Rules(keep=1), at=datetime.now(UTC) + timedelta(days=8))
    before = disk(registry)
    assert gc.frees(registry, late) == gc.Frees(own, 0)
    gc.apply(registry, late)
    assert before - disk(registry) == own


def disk(registry):
    """Bytes of all model files, each counted once."""
    return sum({path.stat().st_ino: path.stat().st_size for path in registry.root.rglob("model/**/*") if path.is_file()}.values())


def test_resumable_states_count_as_what_they_give_back(align, registry, tmp_path):
    for number in range(2):
        save = tmp_path / str(number) / "checkpoint-4"
        save.mkdir(parents=True)
        (save / "optimizer.pt").write_bytes(bytes([number]) * 1000)
        resumable.keep(registry, publish(registry), save)
    assert frees(align)["when_the_trash_is_emptied"] == 0, "the run's own folder still holds it"
    (tmp_path / "0" / "checkpoint-4" / "optimizer.pt").unlink()
    assert frees(align)["when_the_trash_is_emptied"] == 1000


def test_the_command_shows_a_plan_and_does_it_when_told(align, registry):
    for _ in range(5):
        publish(registry)
    code, out, _ = align("gc")
    assert (code, [item.version for item in registry.list()]) == (0, [1, 2, 3, 4, 5])
    assert "3 kept, 2 would go to the trash" in out
    assert "nothing was changed; to do it: align " in out
    code, out, _ = align("gc", "--apply", "--json")
    facts = json.loads(out)
    assert (code, facts["applied"], [item["ref"] for item in facts["trash"]]) == (0, True, ["sft/demo@1", "sft/demo@2"])
    assert align("restore")[1].count("no rule keeps it") == 2
    assert align("restore", "sft/demo@2")[1].startswith("restored sft/demo@2")
    assert [item.version for item in registry.list()] == [2, 3, 4, 5]
    assert "2 kept, 0 would go" not in align("gc", "sft/demo", "--keep", "1")[1]
    assert align("gc", "sft/none")[0] == 2
    assert align("gc", "--keep", "0")[0] == 2
    assert align("restore", "nothing")[0] == 2


@pytest.mark.parametrize("text", ["7", "d", "-1d", "7w", "", "nan d"])
def test_a_time_of_grace_that_is_none_is_refused(align, text):
    with pytest.raises(SystemExit) as caught:
        align("gc", f"--grace={text}")
    assert caught.value.code == 2


def test_an_alias_goes_back_step_by_step_and_the_way_is_kept(align, registry):
    for _ in range(3):
        publish(registry)
        registry.set_alias("sft/demo", "production", "sft/demo")
    registry.set_alias("sft/demo", "production", "sft/demo@3")  # no move
    for version in (2, 1):
        assert align("alias", "sft/demo", "production", "--rollback")[1].startswith(f"sft/demo@production points at sft/demo@{version} ")
    code, _, err = align("alias", "sft/demo", "production", "--rollback")
    assert (code, "has nowhere to go back to: it points at sft/demo@1" in err) == (2, True)
    registry.set_alias("sft/demo", "production", "sft/demo@3")
    assert align("alias", "sft/demo", "production", "--rollback", "--json")[0] == 0
    assert registry.resolve("sft/demo@production").version == 1
    code, out, _ = align("alias", "sft/demo", "production", "--history")
    assert [line.split()[:2] for line in out.splitlines()[1:]] == [[str(i), f"sft/demo@{v}"] for i, v in enumerate((1, 2, 3, 3, 2, 1, 3, 1), 1)]
    assert "rollback of 3" in out
    for words in (("alias", "sft/demo", "--rollback"), ("alias", "sft/demo", "none", "--rollback"), ("alias", "sft/demo", "--history")):
        assert align(*words)[0] == 2
