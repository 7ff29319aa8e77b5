"""Which checkpoints may go, and their way to the trash and out of it.

Kept are: the newest K sound ones of each name, what an alias points at (or would after a rollback), what a running job holds a lease on,
the best by named metrics, what was restored lately, and everything that one of these was made from. Of no name the last checkpoint that
verifies goes. All others are moved to ROOT/trash and deleted when they have lain there for the time of grace.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.errors import UserError
from stages.registry import resumable, trash
from stages.registry.best import best_of_each_set, check_chooses
from stages.registry.integrity import check
from stages.registry.leases import Lease, counting, leases
from stages.registry.manifest import Checkpoint
from stages.registry.sizes import freed
from stages.registry.storage import storage_error

if TYPE_CHECKING:
    from stages.registry.registry import Registry


@dataclass(frozen=True)
class Rules:
    """keep: the newest checkpoints of each name that stay. keep_resume: of how many of them the resumable state stays, if it is there. best: metrics of which each name's best stays, of every evaluation set.
    grace: how long the trash is kept. stage, name: only there (None: everywhere)."""

    keep: int = 3
    keep_resume: int = 1
    best: tuple[str, ...] = ()
    grace: timedelta = timedelta(days=7)
    stage: str | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        if self.keep < 1:
            raise UserError(f"keep {self.keep}: at least the newest checkpoint of each name stays; give 1 or more")
        if self.keep_resume < 0:
            raise UserError(f"keep_resume {self.keep_resume}: give 0 or more")
        for metric in self.best:
            check_chooses(metric, f"best {metric}")
        if self.grace < timedelta(0):
            raise UserError("grace: a time of grace can't be negative; give for example 7d, 12h or 0")


@dataclass
class Plan:
    """What gc would do. `why`: checkpoint id -> why it stays. `records`: id of what goes -> number of its newest record when this was decided."""

    kept: list[Checkpoint] = field(default_factory=list)
    going: list[Checkpoint] = field(default_factory=list)
    why: dict[str, str] = field(default_factory=dict)
    records: dict[str, int] = field(default_factory=dict)
    overdue: list[trash.Trashed] = field(default_factory=list)  # in the trash for longer than the grace
    waiting: list[trash.Trashed] = field(default_factory=list)  # in the trash, may still be restored
    returning: list[trash.Trashed] = field(default_factory=list)  # in the trash although something refers to them
    leftovers: list[Path] = field(default_factory=list)  # of killed writers
    in_progress: list[Path] = field(default_factory=list)  # drafts whose writer may live
    lapsed: list[Lease] = field(default_factory=list)
    resume: list[Checkpoint] = field(default_factory=list)  # resumable states that go; their models may stay
    resume_overdue: list[trash.Trashed] = field(default_factory=list)
    damaged: dict[str, str] = field(default_factory=dict)  # id -> what is wrong with its manifest: never moved


@dataclass(frozen=True)
class Done:
    """What gc did. saved: checkpoints that stay after all, because meanwhile something came to refer to them, or somebody restored them."""

    trashed: list[Checkpoint]
    saved: list[str]
    purged: list[trash.Trashed]
    returned: list[str]
    removed: list[Path]


def make_plan(registry: Registry, rules: Rules, *, deep: bool = False, at: datetime | None = None) -> Plan:
    """Decide about every checkpoint; nothing is changed. deep: read one checkpoint of each name that loses any, byte by byte.

    Raises UserError for a metric that nothing was evaluated for, an alias file that is damaged.
    """
    at = at or datetime.now(UTC)
    everything = registry.list()
    records = {item.id: trash.newest(registry.root, item.id) for item in everything}  # read first: what is restored from now on is known to be
    families: dict[str, list[Checkpoint]] = {}
    for item in everything:
        if rules.stage in (None, item.stage) and rules.name in (None, item.name):
            families.setdefault(f"{item.stage}/{item.name}", []).append(item)
    why = references(registry, at)
    for key, told in (*_best(registry, families, rules), *_newest(families, rules), *_restored(registry, families, rules, at)):
        why.setdefault(key, told)
    inside = {item.id for items in families.values() for item in items}
    why |= {item.id: "outside of what was asked about" for item in everything if item.id not in inside}
    by_id = {item.id: item for item in (*_readable(trash.folders(registry.root, why).values()), *everything)}  # a parent in the trash leads to its own parents
    _with_parents(why, by_id)
    for items in families.values():
        _one_that_verifies(items, why, deep)
    _with_parents(why, by_id)
    plan = Plan(damaged={key: str(item) for key, item in registry.damaged().items()})
    for item in everything:
        if item.id in inside:
            (plan.kept if item.id in why else plan.going).append(item)
    plan.why = {item.id: why[item.id] for item in plan.kept}
    plan.records = {item.id: records[item.id] for item in plan.going}
    _look_at_trash(registry, plan, why, rules, at)
    _look_at_resume(registry, plan, rules, at)
    plan.leftovers, plan.in_progress = trash.leftovers(registry.root, rules.grace, at)
    plan.lapsed = [lease for lease in leases(registry.root) if lease.lapsed(at)]
    return plan


@dataclass(frozen=True)
class Frees:
    """Bytes that become free: at once, of what is deleted for good, and, of what goes to the trash, when that is emptied. Identical files are stored
    once, so both may be far less than the sizes."""

    now: int
    later: int


def frees(registry: Registry, plan: Plan) -> Frees:
    """What carrying a plan out gives back; to be asked before it is carried out. The resumable states count as well."""
    states = resumable.root_of(registry)
    gone = [*_in_trash(registry.root, plan.overdue), *_in_trash(states, plan.resume_overdue)]
    waiting = [*_in_trash(registry.root, [*plan.waiting, *plan.returning]), *_in_trash(states, trash.trashed(states), but=plan.resume_overdue)]
    going = {item.path for item in (*plan.going, *plan.resume)}
    there = [item for item in (*registry.list(), *resumable.kept(registry)) if item.path not in going]
    leaving = [*plan.going, *plan.resume]
    return Frees(freed(gone, [*there, *leaving, *waiting]), freed(leaving, there))


def _in_trash(root: Path, items: Iterable[trash.Trashed], but: Iterable[trash.Trashed] = ()) -> list[Checkpoint]:
    """The checkpoints in the trash of a root, those that can be read."""
    left, folders = {item.id for item in but}, trash.folders(root)
    return _readable(folders.get(item.id, root / "trash" / item.id) for item in items if item.id not in left)


def _readable(folders: Iterable[Path]) -> list[Checkpoint]:
    return [item for item in map(trash.read, folders) if isinstance(item, Checkpoint)]


def apply(registry: Registry, plan: Plan, told: Callable[[str], None] = lambda line: None) -> Done:
    """Carry a plan out. Whatever came to be referred to since the plan was made is back in its place at the end. Raises UserError."""
    try:
        return _apply(registry, plan, told)
    except OSError as error:
        if wrong := storage_error(error, "collecting garbage", "What was moved to the trash by then can be restored; gc goes on where it stopped when it is run again."):
            raise wrong from error
        raise


def _apply(registry: Registry, plan: Plan, told: Callable[[str], None]) -> Done:
    root = registry.root
    trash.finish_purges(root, all_references(registry))
    returned = [item.id for item in plan.returning if trash.bring_back(root, item.id, "something refers to it")]
    moved, spared = _move_away(registry, plan)
    back = _save_referenced(registry, {item.id for item in moved})
    saved = [*spared, *back]
    for item in moved:
        if item.id not in saved:
            told(f"trashed {item.ref} ({item.id})")
    for checkpoint_id, why in (spared | dict.fromkeys(back, "something came to refer to it")).items():
        told(f"kept {checkpoint_id}: {why}")
    for waiting in plan.waiting:
        if waiting.since is None:  # its record was lost: its time of grace begins now
            trash.record(root, waiting.id, "trashed", waiting.ref, "no record said since when")
    deleted = trash.purge(root, [item.id for item in plan.overdue], lambda: all_references(registry))
    _collect_resume(registry, plan)
    trash.remove(plan.leftovers)
    for lease in plan.lapsed:
        lease.file.unlink(missing_ok=True)
    return Done([item for item in moved if item.id not in saved], saved, [item for item in plan.overdue if item.id in deleted], returned, plan.leftovers)


def _move_away(registry: Registry, plan: Plan) -> tuple[list[Checkpoint], dict[str, str]]:
    """Announce, look once more whether something refers to what goes, move the rest. What was moved; id -> why of what was spared."""
    root = registry.root
    spared = {item.id: "restored since it was decided that it goes" for item in plan.going if _restored_since(root, item.id, plan)}
    leaving = {item.id: item for item in plan.going if item.id not in spared}
    for item in leaving.values():
        trash.announce(root, item.id, item.ref, "no rule keeps it")
    why = references(registry) | {parent: f"{item.ref} was made from it" for item in registry.list() if item.id not in leaving for parent in item.parent_ids}
    _with_parents(why, leaving)
    moved = []
    for key, item in leaving.items():
        if key in why:
            spared[key] = why[key]
            trash.spare(root, key, item.ref, why[key])
        elif trash.last_event(root, key).get("event") != "trashed":  # another gc had moved it and somebody restored it, or somebody waited too long for the move
            spared[key] = "restored or asked for meanwhile"
        elif trash.put(root, key):
            moved.append(item)
    return moved, spared


def _restored_since(root: Path, checkpoint_id: str, plan: Plan) -> bool:
    """Whether another gc moved it and somebody brought it back after this plan was made: who did wants it."""
    decided = plan.records.get(checkpoint_id)
    return decided is not None and trash.newest(root, checkpoint_id) != decided and trash.last_event(root, checkpoint_id).get("event") == "restored"


def _save_referenced(registry: Registry, moved: set[str]) -> list[str]:
    """Move back what something refers to by now, and what that was made from. Ids that are back."""
    saved: list[str] = []
    while wanted := moved.intersection(all_references(registry)) - set(saved):
        back = [item for item in sorted(wanted) if trash.bring_back(registry.root, item, "something came to refer to it")]
        if not back:
            break
        saved += back
    return saved


def _look_at_resume(registry: Registry, plan: Plan, rules: Rules, at: datetime) -> None:
    """Resumable states go by a rule of their own: those of the newest `keep_resume` checkpoints of each name stay."""
    stays = {item.id for item in plan.kept if not plan.why[item.id].startswith("damaged")}
    counted: dict[str, int] = {}
    for item in reversed(resumable.kept(registry)):
        if rules.stage not in (None, item.stage) or rules.name not in (None, item.name):
            continue
        family = f"{item.stage}/{item.name}"
        number = counted.get(family, 0)
        counted[family] = number + (item.id in stays)
        if item.id not in stays or number >= rules.keep_resume:
            plan.resume.insert(0, item)
    old = trash.trashed(resumable.root_of(registry))
    plan.resume_overdue = [item for item in old if item.since is not None and at - item.since > rules.grace]


def _collect_resume(registry: Registry, plan: Plan) -> None:
    root = resumable.root_of(registry)
    for item in plan.resume:
        trash.announce(root, item.id, item.ref, "no rule keeps its resumable state")
        trash.put(root, item.id)
    trash.purge(root, [item.id for item in plan.resume_overdue], lambda: ())
    trash.finish_purges(root, ())


def references(registry: Registry, at: datetime | None = None) -> dict[str, str]:
    """Id -> why: what an alias points at or would after a rollback, and what a lease that counts is on. Raises UserError."""
    found: dict[str, str] = {}
    for family in alias_families(registry.root):
        for alias, checkpoint_id in registry.aliases(family).items():
            found[checkpoint_id] = f"{family}@{alias} points at it"
            if previous := registry.rollback_target(family, alias):
                found.setdefault(previous, f"a rollback of {family}@{alias} would need it")
    for checkpoint_id, held in counting(registry.root, at or datetime.now(UTC)).items():
        found[checkpoint_id] = f"in use: {held[0]}"
    return found


def all_references(registry: Registry) -> dict[str, str]:
    """`references`, and what the checkpoints in their place were made from."""
    found = references(registry)
    for item in registry.list():
        for parent in item.parent_ids:
            found.setdefault(parent, f"{item.ref} was made from it")
    return found


def alias_families(root: Path) -> list[str]:
    """Every stage/name that has, or had, an alias."""
    stages = sorted(path for path in (root / "aliases").glob("*") if path.is_dir())
    return [f"{stage.name}/{name}" for stage in stages for name in sorted(os.listdir(stage)) if (stage / name).is_dir() and not name.startswith(".")]


def _newest(families: Mapping[str, list[Checkpoint]], rules: Rules) -> Iterable[tuple[str, str]]:
    """The newest `keep` sound ones, and what is newer than they are though it is damaged (somebody may want to look at it)."""
    for items in families.values():
        sound = 0
        for item in sorted(items, key=lambda item: item.version, reverse=True):
            if sound == rules.keep:
                break
            whole = not check(item.path)
            sound += whole
            yield item.id, f"one of the newest {rules.keep}" if whole else "damaged, and newer than the sound ones"


def _best(registry: Registry, families: Mapping[str, list[Checkpoint]], rules: Rules) -> Iterable[tuple[str, str]]:
    for metric in rules.best:
        none = True
        for items in families.values():
            by_version = {item.version: item for item in items}
            found = best_of_each_set(metric, {version: registry.evaluations(item) for version, item in by_version.items()})
            none = none and not found
            for name, version in found.items():
                yield by_version[version].id, f"best {metric} on evaluation set {name}"
        if none:
            raise UserError(f"best {metric}: no checkpoint was evaluated for it, so this rule would keep nothing; see align registry show REF for the metrics there are")


def _restored(registry: Registry, families: Mapping[str, list[Checkpoint]], rules: Rules, at: datetime) -> Iterable[tuple[str, str]]:
    """What was brought back from the trash stays for one more time of grace."""
    for items in families.values():
        for item in items:
            last = trash.last_event(registry.root, item.id)
            if last.get("event") == "restored" and at - datetime.fromisoformat(last["created"]) <= rules.grace:
                yield item.id, f"restored at {last['created']}"


def _with_parents(why: dict[str, str], by_id: Mapping[str, Checkpoint]) -> None:
    """Add all that the kept ones were made from."""
    waiting = [by_id[key] for key in why if key in by_id]
    while waiting:
        item = waiting.pop()
        for parent in item.parent_ids:
            if parent not in why:
                why[parent] = f"{item.ref} was made from it"
                if parent in by_id:
                    waiting.append(by_id[parent])


def _one_that_verifies(items: list[Checkpoint], why: dict[str, str], deep: bool) -> None:
    """Of a name that would lose checkpoints, one that stays must verify: where none of them does, one that would go stays too."""
    newest_first = sorted(items, key=lambda item: item.version, reverse=True)
    going = [item for item in newest_first if item.id not in why]
    kept = [item for item in newest_first if item.id in why]
    if not going or any(not check(item.path, deep) for item in kept):
        return
    sound = next((item for item in going if not check(item.path, deep)), None)
    for item in [sound] if sound else going:  # where none verifies at all, nothing goes
        why[item.id] = "the newest that verifies" if sound else f"no checkpoint of {item.stage}/{item.name} verifies"


def _look_at_trash(registry: Registry, plan: Plan, why: Mapping[str, str], rules: Rules, at: datetime) -> None:
    """Something refers to it, or to what was made from it: it returns. Its time is over, and nothing that may still be restored was made from it: it goes."""
    there = trash.trashed_after_purges(registry.root, why)
    made_from = {key: trash.parents_in(folder) for key, folder in trash.folders(registry.root, why).items()}
    returning = trash.with_parents([item.id for item in there if item.id in why], made_from)
    over = {item.id for item in there if item.since is not None and at - item.since > rules.grace}
    entering = (parent for item in plan.going for parent in item.parent_ids if parent in made_from)
    needed = trash.with_parents([*(item.id for item in there if item.id not in over), *entering], made_from)
    for item in there:
        if item.id in returning:
            plan.returning.append(item)
        elif item.id in over and item.id not in needed:
            plan.overdue.append(item)
        else:
            plan.waiting.append(item)


def to_json(plan: Plan, done: Done | None, free: Frees) -> dict[str, Any]:
    """A plan, and what was done of it, for machines."""
    def names(items: Iterable[Checkpoint]) -> list[dict[str, Any]]:
        return [{"ref": item.ref, "id": item.id, "size": item.size} for item in items]

    facts: dict[str, Any] = {
        "applied": done is not None, "trash": names(done.trashed if done else plan.going),
        "keep": [{**entry, "why": plan.why[entry["id"]]} for entry in names(plan.kept)],
        "purge": [item.to_json() for item in (done.purged if done else plan.overdue)], "waiting": [item.to_json() for item in plan.waiting],
        "resume": names(plan.resume), "purge_resume": [item.to_json() for item in plan.resume_overdue],
        "restore": done.returned if done else [item.id for item in plan.returning], "leftovers": [str(path) for path in plan.leftovers],
        "in_progress": [str(path) for path in plan.in_progress], "lapsed_leases": [str(lease) for lease in plan.lapsed], "damaged": plan.damaged,
        "frees": {"now": free.now, "when_the_trash_is_emptied": free.later},
    }  # fmt: skip
    return facts | ({"saved": done.saved} if done else {})
