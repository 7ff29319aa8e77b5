"""Garbage collection: what stays and why, the trash and the way back, and what happens beside it."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta

import pytest

from configs.errors import UserError
from stages.registry import Parent, Registry, gc, leases, ledger, trash
from stages.registry.gc import Rules
from stages.registry.holder import staging_name
from stages.registry.names import new_id
from tests.unit.registry_samples import ROOT, flip_bit, publish

LATER = datetime.now(UTC) + timedelta(days=8)


@pytest.fixture
def registry(tmp_path, monkeypatch):
    monkeypatch.setattr("stages.registry.provenance._git", lambda *args: None)
    return Registry(tmp_path / "registry")


def versions(registry, family="sft/demo"):
    return [item.version for item in registry.list(*family.split("/"))]


def collect(registry, rules=None, at=None):
    return gc.apply(registry, gc.make_plan(registry, rules or Rules(keep=1), deep=True, at=at))


def test_the_newest_k_of_each_name_stay_and_the_others_can_be_brought_back(registry):
    for family in ("sft/demo", "sft/other"):
        for _ in range(4):
            publish(registry, family)
    plan = gc.make_plan(registry, Rules(keep=2))
    assert versions(registry) == [1, 2, 3, 4]  # a plan changes nothing
    assert [item.ref for item in plan.going] == ["sft/demo@1", "sft/demo@2", "sft/other@1", "sft/other@2"]
    done = gc.apply(registry, plan)
    assert (versions(registry), versions(registry, "sft/other"), done.saved) == ([3, 4], [3, 4], [])
    with pytest.raises(UserError, match=r"has no version 1 .*it lies in the trash: align registry restore sft/demo@1"):
        registry.resolve("sft/demo@1")
    back = registry.restore("sft/demo@1")
    assert registry.verify(back.id, deep=True) == []
    assert registry.restore(trash.find(registry.root, "sft/other@2")).ref == "sft/other@2"
    assert versions(registry) == [1, 3, 4]
    assert gc.make_plan(registry, Rules(keep=2)).going == []  # restored a moment ago
    assert [item.version for item in gc.make_plan(registry, Rules(keep=2), at=LATER).going] == [1, 2]
    assert publish(registry).version == 5  # a number is never given twice


def test_aliases_rollback_targets_leases_and_all_that_they_were_made_from_stay(registry):
    base = publish(registry, "sft/base")
    for _ in range(3):
        publish(registry, "sft/base")
    for number in range(6):
        publish(registry, parents=[Parent.of(base, "init_from")] if number == 1 else [])
    registry.set_alias("sft/demo", "production", "sft/demo@1")
    registry.set_alias("sft/demo", "production", "sft/demo@2")
    held = registry.lease(registry.resolve("sft/demo@3"), "eval")
    plan = gc.make_plan(registry, Rules(keep=1))
    why = {item.ref: plan.why[item.id] for item in plan.kept}
    assert why["sft/demo@1"] == "a rollback of sft/demo@production would need it"
    assert why["sft/demo@2"] == "sft/demo@production points at it"
    assert why["sft/demo@3"].startswith("in use: process ")
    assert why["sft/demo@6"] == "one of the newest 1"
    assert why["sft/base@1"] == "sft/demo@2 was made from it"
    assert [item.ref for item in plan.going] == ["sft/base@2", "sft/base@3", "sft/demo@4", "sft/demo@5"]
    held.give_back()
    assert "sft/demo@3" in [item.ref for item in gc.make_plan(registry, Rules(keep=1)).going]
    assert os.listdir(registry.root / "leases") == []


def test_the_best_by_a_named_metric_stays_on_every_evaluation_set(registry):
    for eval_set, score, loss in (("a", 1.0, 0.1), ("a", 3.0, 0.2), ("b", 9.0, 0.3), ("b", 2.0, 0.4), ("a", 0.0, 0.5)):
        registry.add_evaluation(publish(registry), {"eval_set": eval_set, "metrics": {"score": score, "loss": loss}})
    assert [item.version for item in gc.make_plan(registry, Rules(keep=1, best=("score",))).kept] == [2, 3, 5]
    assert [item.version for item in gc.make_plan(registry, Rules(keep=1, best=("loss",))).kept] == [1, 3, 5]
    with pytest.raises(UserError, match="best scroe: no checkpoint was evaluated for it"):
        gc.make_plan(registry, Rules(best=("scroe",)))


def test_best_means_the_same_after_gc_where_its_metric_was_named_and_never_a_trashed_one(registry):
    for score in (3.0, 1.0, 2.0):
        registry.add_evaluation(publish(registry), {"eval_set": "a", "score": score})
    collect(registry, Rules(keep=1, best=("score",)))
    assert registry.resolve("sft/demo@best:score").version == 1
    registry.restore("sft/demo@2")
    collect(registry, Rules(keep=1), at=LATER)
    assert registry.resolve("sft/demo@best:score").version == 3
    registry.restore("sft/demo@1")
    assert registry.resolve("sft/demo@best:score").version == 1  # its results were kept


def test_the_last_one_that_verifies_is_never_moved(registry):
    for _ in range(4):
        publish(registry)
    for version in (3, 4):  # the same size: only reading it shows
        flip_bit(registry.resolve(f"sft/demo@{version}").model_dir / "config.json", 3)
    plan = gc.make_plan(registry, Rules(keep=2), deep=True)
    assert {item.version: plan.why[item.id] for item in plan.kept} == {
        2: "the newest that verifies", 3: "one of the newest 2", 4: "one of the newest 2",
    }  # fmt: skip
    gc.apply(registry, plan)
    for version in (2, 3, 4):
        flip_bit(registry.root / "checkpoints" / registry.id_of(f"sft/demo@{version}") / "model" / "config.json", 5)
    assert gc.make_plan(registry, Rules(keep=1), deep=True).going == []  # nothing verifies: nothing goes


def test_damaged_ones_neither_count_nor_go(registry):
    for _ in range(5):
        publish(registry)
    os.unlink(registry.resolve("sft/demo@5").model_dir / "config.json")
    os.unlink(registry.resolve("sft/demo@1").path / "manifest.json")
    plan = gc.make_plan(registry, Rules(keep=2))
    assert {item.version: plan.why[item.id] for item in plan.kept} == {
        5: "damaged, and newer than the sound ones", 4: "one of the newest 2", 3: "one of the newest 2",
    }  # fmt: skip
    assert ([item.version for item in plan.going], len(plan.damaged)) == ([2], 1)


def test_a_damaged_alias_stops_gc_before_it_moves_anything(registry):
    for _ in range(3):
        publish(registry)
    registry.set_alias("sft/demo", "production", "sft/demo@1")
    flip_bit(ledger.entry_path(registry.root / "aliases/sft/demo/production", 1), 20)
    with pytest.raises(UserError, match=r"production/00000001\.json"):
        gc.make_plan(registry, Rules(keep=1))


def test_the_trash_is_emptied_after_the_grace_and_not_before(registry):
    for _ in range(3):
        publish(registry)
    collect(registry)
    assert (versions(registry), len(trash.trashed(registry.root))) == ([3], 2)
    assert collect(registry).purged == []
    one = trash.find(registry.root, "sft/demo@1")
    done = collect(registry, at=LATER)
    assert sorted(item.ref for item in done.purged) == ["sft/demo@1", "sft/demo@2"]
    assert sorted(os.listdir(registry.root / "trash")) == ["records"]
    assert trash.last_event(registry.root, one)["event"] == "purged"
    with pytest.raises(UserError, match=r"is not in the trash of .*; it is empty"):
        registry.restore(one)


def test_without_a_record_the_grace_begins_anew(registry):
    publish(registry)
    publish(registry)
    collect(registry)
    shutil.rmtree(registry.root / "trash" / "records")
    assert collect(registry, at=LATER).purged == []
    assert trash.trashed(registry.root)[0].since is not None


@pytest.mark.parametrize("moment", ["announce", "put"])
@pytest.mark.parametrize("refer", ["alias", "lease", "child"])
def test_what_is_referred_to_while_gc_moves_it_ends_in_its_place(registry, monkeypatch, refer, moment):
    """The other process refers to the checkpoint just before gc looks whether anybody does ("announce"), or just after it has looked ("put")."""
    first = publish(registry)
    publish(registry)
    real, held = getattr(trash, moment), []
    monkeypatch.setattr(trash, "PATIENCE", 0)  # who refers to it is this very process, which can't wait for itself

    def meanwhile(root, checkpoint_id, *rest):
        monkeypatch.setattr(trash, moment, real)
        if refer == "alias":
            ledger.append(registry.root / "aliases/sft/demo/production", lambda n: {"id": checkpoint_id, "ref": first.ref, "created": "2026-01-01T00:00:00Z"})
        elif refer == "lease":
            held.append(leases.take(registry.root, [checkpoint_id], "ppo"))
        else:
            publish(registry, "reward/demo", parents=[Parent.of(first, "init_from")])
        return real(root, checkpoint_id, *rest)

    monkeypatch.setattr(trash, moment, meanwhile)
    done = collect(registry)
    assert (done.saved, done.trashed, versions(registry)) == ([first.id], [], [1, 2])
    assert trash.last_event(registry.root, first.id)["event"] == ("kept" if moment == "announce" else "restored")
    for lease in held:
        lease.give_back()


def test_who_takes_a_lease_waits_for_a_move_that_is_announced(registry):
    """Else gc, which looked before the lease was there, would move the checkpoint away while it is read, and back again."""
    first = publish(registry)
    publish(registry)
    trash.announce(registry.root, first.id, first.ref, "no rule keeps it")
    began, moves = time.monotonic(), threading.Timer(0.3, trash.put, (registry.root, first.id))
    moves.start()
    held = registry.lease(first, "ppo")
    assert time.monotonic() - began > 0.25
    assert registry.verify(first.id) == []
    moves.join()
    assert trash.last_event(registry.root, first.id)["event"] == "restored"
    held.give_back()
    dead = subprocess.run([sys.executable, "-c", "import json; from stages.registry.holder import this_process; print(json.dumps(this_process().to_json()))"], cwd=ROOT, capture_output=True, text=True, check=True)
    body = trash.last_event(registry.root, first.id) | {"event": "trashed", "by": json.loads(dead.stdout)}
    body.pop("hash")
    ledger.append(registry.root / "trash" / "records" / first.id, lambda n: body)
    began = time.monotonic()
    registry.lease(first, "ppo").give_back()  # nobody waits for the dead
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("refer", ["alias", "lease", "child"])
def test_who_refers_to_what_gc_has_just_moved_brings_it_back(registry, monkeypatch, refer):
    first = publish(registry)
    publish(registry)
    plan = gc.make_plan(registry, Rules(keep=1))
    if refer == "alias":
        real = ledger.append
        monkeypatch.setattr(ledger, "append", lambda folder, *rest: [monkeypatch.undo(), gc.apply(registry, plan), real(folder, *rest)][2])
        registry.set_alias("sft/demo", "production", "sft/demo@1")
    else:
        gc.apply(registry, plan)
        assert versions(registry) == [2]
        held = registry.lease(first, "ppo") if refer == "lease" else publish(registry, "reward/demo", parents=[Parent.of(first, "init_from")])
    assert versions(registry) == [1, 2]
    assert registry.verify(first.id, deep=True) == []
    if refer == "lease":
        held.give_back()


def test_an_alias_whose_mover_was_killed_before_it_looked_still_leads_to_its_checkpoint(registry):
    first = publish(registry)
    publish(registry)
    collect(registry)
    ledger.append(registry.root / "aliases/sft/demo/production", lambda n: {"id": first.id, "ref": first.ref, "created": "2026-01-01T00:00:00Z"})
    assert [item.id for item in gc.make_plan(registry, Rules(keep=1), at=LATER).returning] == [first.id]
    assert registry.resolve("sft/demo@production").id == first.id
    assert versions(registry) == [1, 2]


def test_a_purge_looks_once_more_before_the_first_file_goes(registry, monkeypatch):
    first = publish(registry)
    publish(registry)
    collect(registry)
    plan = gc.make_plan(registry, Rules(keep=1), at=LATER)
    assert [item.id for item in plan.overdue] == [first.id]
    real = trash._move

    def meanwhile(source, target):
        if target.name.startswith(trash.PURGED):
            ledger.append(registry.root / "aliases/sft/demo/production", lambda n: {"id": first.id, "ref": first.ref, "created": "2026-01-01T00:00:00Z"})
        return real(source, target)

    monkeypatch.setattr(trash, "_move", meanwhile)
    assert gc.apply(registry, plan).purged == []
    assert registry.verify("sft/demo@production", deep=True) == []


def family(registry):
    """Base -> child -> grandchild, all in the trash, beside newer ones; the grandchild moved there a week after the others."""
    base = publish(registry, "sft/base")
    child = publish(registry, "sft/child", parents=[Parent.of(base, "init_from")])
    grandchild = publish(registry, "sft/demo", parents=[Parent.of(child, "init_from")])
    for name in ("sft/base", "sft/child", "sft/demo"):
        publish(registry, name)
    collect(registry)
    assert {item.id for item in trash.trashed(registry.root)} == {base.id, child.id, grandchild.id}
    body = trash.last_event(registry.root, grandchild.id) | {"created": (datetime.now(UTC) + timedelta(days=7)).isoformat()}
    ledger.append(registry.root / "trash" / "records" / grandchild.id, lambda n: {key: value for key, value in body.items() if key != "hash"})
    return base, child, grandchild


def test_what_can_be_restored_keeps_what_it_was_made_from_in_the_trash_and_brings_it_along(registry):
    """The parents had been a week longer in the trash, and were deleted: what was restored then could not be loaded."""
    base, child, grandchild = family(registry)
    plan = gc.make_plan(registry, Rules(keep=1), at=LATER)
    assert (plan.overdue, len(plan.waiting)) == ([], 3)
    assert trash.purge(registry.root, [base.id, child.id], lambda: gc.all_references(registry)) == []
    assert {item.id for item in trash.trashed(registry.root)} == {base.id, child.id, grandchild.id}
    registry.restore(grandchild.id)
    assert trash.trashed(registry.root) == []
    assert all(registry.verify(item.id, deep=True) == [] for item in (base, child, grandchild))


def test_a_child_that_comes_back_while_its_parents_are_deleted_brings_them_back(registry):
    """gc looked among what is in its place while the child was in the trash, and at the trash when the child had left it."""
    base, child, grandchild = family(registry)
    asked = []

    def wanted():
        found = gc.all_references(registry)
        if not asked:
            registry.restore(grandchild.id)  # right after gc has looked
        asked.append(found)
        return found

    assert trash.purge(registry.root, [child.id, base.id], wanted) == []
    assert all(registry.verify(item.id, deep=True) == [] for item in (base, child, grandchild))


def test_a_child_that_another_gc_renames_between_listing_and_reading_is_looked_for_again(registry, monkeypatch):
    """Its manifest was not found under the listed name, so its parents counted as nobody's."""
    base, child, grandchild = family(registry)
    aside = registry.root / "trash" / f"{trash.PURGED}{grandchild.id}"
    os.rename(registry.root / "trash" / grandchild.id, aside)
    real = trash._contents

    def contents(root):
        found = real(root)
        if aside.is_dir():
            os.rename(aside, root / "trash" / grandchild.id)  # the other gc found that it is needed
        return found

    monkeypatch.setattr(trash, "_contents", contents)
    assert trash.purge(registry.root, [base.id, child.id], lambda: gc.all_references(registry)) == []
    registry.restore(grandchild.id)
    assert all(registry.verify(item.id, deep=True) == [] for item in (base, child, grandchild))


def test_nothing_is_deleted_while_the_trash_does_not_hold_still(registry, monkeypatch):
    base, child, grandchild = family(registry)
    turn = iter(range(100))
    monkeypatch.setattr(trash, "_contents", lambda root: [f"{trash.PURGED}{next(turn)}"])
    assert trash.purge(registry.root, [base.id, child.id, grandchild.id], lambda: gc.all_references(registry)) == []
    assert len(trash.trashed(registry.root)) == 3


@pytest.mark.parametrize("way", ["purge", "finished purge", "alias"])
def test_whoever_brings_a_checkpoint_back_brings_all_it_was_made_from(registry, way):
    base, child, grandchild = family(registry)
    if way == "purge":
        assert trash.purge(registry.root, [grandchild.id], lambda: {grandchild.id: "an alias"}) == []
    elif way == "finished purge":
        os.rename(registry.root / "trash" / grandchild.id, registry.root / "trash" / f"{trash.PURGED}{grandchild.id}")
        trash.finish_purges(registry.root, {grandchild.id: "an alias"})
    else:
        ledger.append(registry.root / "aliases/sft/demo/production", lambda n: {"id": grandchild.id, "ref": grandchild.ref, "created": "2026-01-01T00:00:00Z"})
        collect(registry)
    assert trash.trashed(registry.root) == []
    assert all(registry.verify(item.id, deep=True) == [] for item in (base, child, grandchild))


def test_a_restore_that_was_cut_short_is_completed_by_the_next(registry, monkeypatch):
    """The checkpoint and its parent were back, the parent's parent was not: the next restore stopped at the parent."""
    monkeypatch.setattr(trash, "PATIENCE", 0)  # who announced their moves is this very process, which can't wait for itself
    base, child, grandchild = family(registry)
    for item in (grandchild, child):
        os.rename(registry.root / "trash" / item.id, registry.root / "checkpoints" / item.id)
    registry.lease(grandchild, "ppo").give_back()
    assert registry.verify(base.id, deep=True) == []


def test_a_parent_that_is_about_to_be_moved_is_waited_for(registry):
    base, child, grandchild = family(registry)
    for item in (base, child):
        registry.restore(item.id)
    trash.announce(registry.root, base.id, base.ref, "no rule keeps it")
    moves = threading.Timer(0.3, trash.put, (registry.root, base.id))
    moves.start()
    registry.restore(grandchild.id)
    assert registry.verify(base.id) == []
    moves.join()
    assert registry.verify(base.id, deep=True) == []
    assert trash.last_event(registry.root, base.id)["event"] == "restored"


def test_of_a_purge_that_another_gc_took_apart_nothing_is_said_to_be_deleted(registry):
    base, child, grandchild = family(registry)

    def wanted():
        found = gc.all_references(registry)
        trash.finish_purges(registry.root, found)  # what has no record yet goes back to the trash
        return found

    assert trash.purge(registry.root, [base.id, child.id, grandchild.id], wanted) == []
    assert len(trash.trashed(registry.root)) == 3
    assert all(item.since for item in trash.trashed(registry.root)), "their time of grace goes on"


def test_what_is_deleted_together_keeps_nothing_of_itself(registry):
    base, child, grandchild = family(registry)
    assert {item.id for item in gc.make_plan(registry, Rules(keep=1), at=LATER + timedelta(days=8)).overdue} == {base.id, child.id, grandchild.id}
    assert len(trash.purge(registry.root, [base.id, child.id, grandchild.id], lambda: gc.all_references(registry))) == 3
    assert os.listdir(registry.root / "trash") == ["records"]


def test_a_killed_purge_is_completed_or_undone(registry):
    recorded, not_recorded, _ = (publish(registry) for _ in range(3))
    collect(registry)
    for item in (recorded, not_recorded):
        os.rename(registry.root / "trash" / item.id, registry.root / "trash" / f"{trash.PURGED}{item.id}")
    trash.record(registry.root, recorded.id, "purged", recorded.ref)
    collect(registry)
    assert sorted(os.listdir(registry.root / "trash")) == [not_recorded.id, "records"]


def test_a_dry_run_shows_that_what_a_killed_purge_left_keeps_its_parents_in_the_trash(registry):
    """It named the parents as overdue; carrying that out then left them where they were."""
    base, child, grandchild = family(registry)
    os.rename(registry.root / "trash" / grandchild.id, registry.root / "trash" / f"{trash.PURGED}{grandchild.id}")
    plan = gc.make_plan(registry, Rules(keep=1), at=LATER)
    assert ([item.id for item in plan.overdue], {item.id for item in plan.waiting}) == ([], {base.id, child.id, grandchild.id})
    assert gc.apply(registry, plan).purged == []
    trash.record(registry.root, grandchild.id, "purged", grandchild.ref)
    os.rename(registry.root / "trash" / grandchild.id, registry.root / "trash" / f"{trash.PURGED}{grandchild.id}")
    assert {item.id for item in gc.make_plan(registry, Rules(keep=1), at=LATER).overdue} == {base.id, child.id}


def test_a_dry_run_shows_that_what_a_parent_in_the_trash_was_made_from_stays(registry, monkeypatch):
    """The parent returns, and its own parent, which no rule keeps, with it: the plan said that this one goes."""
    monkeypatch.setattr(trash, "PATIENCE", 0)
    base, child, grandchild = family(registry)
    for item in (base, grandchild):
        os.rename(registry.root / "trash" / item.id, registry.root / "checkpoints" / item.id)
    ledger.append(registry.root / "aliases/sft/demo/production", lambda n: {"id": grandchild.id, "ref": grandchild.ref, "created": "2026-01-01T00:00:00Z"})
    plan = gc.make_plan(registry, Rules(keep=1), at=LATER)
    assert (plan.going, [item.id for item in plan.returning]) == ([], [child.id])
    assert plan.why[base.id] == "sft/child@1 was made from it"
    done = gc.apply(registry, plan)
    assert (done.trashed, done.returned, done.saved) == ([], [child.id], [])


@pytest.mark.parametrize("parents", ["in the trash", "in their place"])
@pytest.mark.parametrize("recorded", [True, False])
def test_a_dry_run_shows_what_returns_of_a_killed_purge(registry, monkeypatch, parents, recorded):
    """An alias points at it. It and its parents were shown as waiting in the trash, or the parents as going, and all came back."""
    monkeypatch.setattr(trash, "PATIENCE", 0)
    base, child, grandchild = family(registry)
    os.rename(registry.root / "trash" / grandchild.id, registry.root / "trash" / f"{trash.PURGED}{grandchild.id}")
    if recorded:
        trash.record(registry.root, grandchild.id, "purged", grandchild.ref)
    if parents == "in their place":
        for item in (base, child):
            os.rename(registry.root / "trash" / item.id, registry.root / "checkpoints" / item.id)
    ledger.append(registry.root / "aliases/sft/demo/production", lambda n: {"id": grandchild.id, "ref": grandchild.ref, "created": "2026-01-01T00:00:00Z"})
    plan = gc.make_plan(registry, Rules(keep=1), at=LATER)
    expected = {grandchild.id} if parents == "in their place" else {base.id, child.id, grandchild.id}
    assert ({item.id for item in plan.returning}, plan.going, plan.waiting, plan.overdue) == (expected, [], [], [])
    done = gc.apply(registry, plan)
    assert (set(done.returned), done.trashed, done.saved, done.purged) == (expected, [], [], [])
    assert all(registry.verify(item.id, deep=True) == [] for item in (base, child, grandchild))


def test_what_is_restored_while_it_is_decided_or_moved_stays(registry, monkeypatch):
    """Another gc moves it and somebody restores it: while this one reads checkpoints to decide, and between its announcement and its move."""
    first = publish(registry)
    publish(registry)

    def elsewhere():
        trash.announce(registry.root, first.id, first.ref, "no rule keeps it")
        assert trash.put(registry.root, first.id)
        registry.restore(first.id)

    with monkeypatch.context() as patch:
        verifies = gc._one_that_verifies
        patch.setattr(gc, "_one_that_verifies", lambda *a: (elsewhere(), verifies(*a)))
        plan = gc.make_plan(registry, Rules(keep=1))
    assert [item.id for item in plan.going] == [first.id]
    told = []
    assert gc.apply(registry, plan, told.append).saved == [first.id]
    assert told == [f"kept {first.id}: restored since it was decided that it goes"]
    plan = gc.make_plan(registry, Rules(keep=1), at=LATER)
    assert [item.id for item in plan.going] == [first.id]
    asked = gc.references
    monkeypatch.setattr(gc, "references", lambda registry, at=None: (elsewhere() if trash.last_event(registry.root, first.id)["event"] == "trashed" else None, asked(registry, at))[1])
    assert gc.apply(registry, plan).saved == [first.id]
    assert (versions(registry), trash.last_event(registry.root, first.id)["event"]) == ([1, 2], "restored")


def test_what_was_restored_after_it_was_decided_that_it_goes_stays(registry):
    first = publish(registry)
    publish(registry)
    plan = gc.make_plan(registry, Rules(keep=1))
    collect(registry)
    registry.restore(first.id)
    done = gc.apply(registry, plan)
    assert (done.trashed, done.saved, versions(registry)) == ([], [first.id], [1, 2])
    assert trash.last_event(registry.root, first.id)["event"] == "restored", "its time of grace goes on"


def test_leftovers_go_when_their_writer_is_dead_or_they_are_old(registry):
    publish(registry)
    folder = registry.root / "checkpoints"
    code = "import sys; from stages.registry.holder import staging_name; print(staging_name(sys.argv[1]))"
    dead = subprocess.run([sys.executable, "-c", code, new_id()], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    alive, old_but_alive = staging_name(new_id()), staging_name("20200101t000000-0123456789ab")
    foreign, old = f".tmp-{new_id()}.000000000000.1.1.1", ".tmp-20200101t000000-0123456789ab.000000000000.1.1.1"
    for name in (dead, alive, old_but_alive, foreign, old):
        (folder / name / "model").mkdir(parents=True)
    (registry.root / "versions/sft/demo" / ".tmp-20200101t000000-0123456789ab").write_text("{")
    (registry.root / "versions/sft/demo" / ".tmp-1").write_text("{")  # tells nothing: kept
    collect(registry)
    assert sorted(name for name in os.listdir(folder) if name.startswith(".tmp-")) == sorted([alive, old_but_alive, foreign])
    assert [name for name in os.listdir(registry.root / "versions/sft/demo") if name.startswith(".tmp-")] == [".tmp-1"]


def test_of_a_rollback_and_a_move_at_once_the_rollback_gives_way(registry, monkeypatch):
    from stages.registry import aliases

    for _ in range(3):
        publish(registry)
        registry.set_alias("sft/demo", "production", "sft/demo")
    real = aliases.move

    def meanwhile(*args, **kwargs):
        monkeypatch.setattr(aliases, "move", real)
        registry.set_alias("sft/demo", "production", "sft/demo@1")
        registry.set_alias("sft/demo", "production", "sft/demo@3")  # where it was: only the number of entries tells
        return real(*args, **kwargs)

    monkeypatch.setattr(aliases, "move", meanwhile)
    with pytest.raises(UserError, match="was not rolled back: it was moved meanwhile"):
        registry.rollback_alias("sft/demo", "production")


def test_a_rollback_to_what_is_gone_or_damaged_says_so_and_changes_nothing(registry):
    for _ in range(2):
        publish(registry)
        registry.set_alias("sft/demo", "production", "sft/demo")
    flip_bit(registry.resolve("sft/demo@1").model_dir / "config.json", 3)
    with pytest.raises(UserError, match="sft/demo@1 is damaged, sft/demo@production was not moved"):
        registry.rollback_alias("sft/demo", "production")
    shutil.rmtree(registry.resolve("sft/demo@1").path)
    with pytest.raises(UserError, match=r"can't go back to sft/demo@1 \(.*, which is not in"):
        registry.rollback_alias("sft/demo", "production")
    assert registry.resolve("sft/demo@production").version == 2


@pytest.mark.parametrize("comes_back", [True, False])
def test_a_checkpoint_that_gc_moves_while_it_is_resolved_is_found_again_or_gone_but_not_damaged(tmp_path, monkeypatch, comes_back):
    registry = Registry(tmp_path)
    made = publish(registry)
    from stages.registry import registry as module

    real, looks = module.check, []

    def check_while_gc_moves(path, deep=False):
        looks.append(path)
        if len(looks) > 1:
            return real(path, deep)
        path.rename(tmp_path / "moved")
        found = real(path, deep)
        if comes_back:
            (tmp_path / "moved").rename(path)
        return found

    monkeypatch.setattr(module, "check", check_while_gc_moves)
    if comes_back:
        assert registry.resolve(made.id).id == made.id
    else:
        with pytest.raises(UserError, match=f"no checkpoint {made.id}"):
            registry.resolve(made.id)
