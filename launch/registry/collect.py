"""`align registry gc` and `restore`: what may go, what goes, and the way back."""

from __future__ import annotations

import argparse
import shlex
import sys
from typing import TYPE_CHECKING, Any

from launch.registry.output import print_json, size, table

if TYPE_CHECKING:
    from stages.registry.gc import Done, Frees, Plan


def run_gc(args: argparse.Namespace) -> int:
    """The plan, or with --apply what was done of it. 0 in both cases."""
    from configs.errors import UserError
    from stages.registry import Registry, gc

    stage, _, name = (args.family or "").partition("/")
    registry = Registry(args.registry, create=False)
    if args.family and not registry.list(stage, name or None):
        raise UserError(f"no checkpoints of {args.family} in {args.registry}; see: align registry list --registry {args.registry}")
    rules = gc.Rules(args.keep, args.keep_resume, tuple(args.best), args.grace, stage or None, name or None)
    plan = gc.make_plan(registry, rules, deep=args.apply)
    free = gc.frees(registry, plan)
    done = gc.apply(registry, plan, _progress) if args.apply else None
    if args.json:
        print_json(gc.to_json(plan, done, free))
    else:
        _show(plan, done, free, args)
    for checkpoint_id, problem in plan.damaged.items():
        print(f"warning: checkpoint {checkpoint_id} is damaged and was left alone: {problem}", file=sys.stderr)
    return 0


def run_restore(args: argparse.Namespace) -> int:
    """Bring one back, or list the trash."""
    from stages.registry import Registry, trash

    registry = Registry(args.registry, create=False)
    if args.ref is None:
        there = trash.trashed(registry.root)
        rows = [(item.ref, size(item.size or 0), str(item.to_json()["since"]), item.why, item.id) for item in there]
        head = ("REF", "SIZE", "IN THE TRASH SINCE", "WHY", "ID")
        print_json([item.to_json() for item in there]) if args.json else print("\n".join(table([head, *rows])) if rows else "the trash is empty")
        return 0
    checkpoint = registry.restore(args.ref)
    facts: dict[str, Any] = {"ref": checkpoint.ref, "id": checkpoint.id, "path": str(checkpoint.path)}
    print_json(facts) if args.json else print(f"restored {checkpoint.ref} ({checkpoint.id}); gc leaves it alone for one more time of grace")
    return 0


def _progress(line: str) -> None:
    print(line, file=sys.stderr)


def _show(plan: Plan, done: Done | None, free: Frees, args: argparse.Namespace) -> None:
    going = done.trashed if done else plan.going
    rows = [("trashed" if done else "trash", item.ref, size(item.size), "no rule keeps it", item.id) for item in going]
    rows += [("purged" if done else "purge", item.ref, size(item.size or 0), f"in the trash since {item.since:%Y-%m-%d %H:%M}", item.id) for item in (done.purged if done else plan.overdue)]
    rows += [("restored" if done else "restore", item.ref, size(item.size or 0), "something refers to it", item.id) for item in plan.returning]
    rows += [("trashed" if done else "trash", f"{item.ref} (resume)", size(item.size), "no rule keeps its resumable state", item.id) for item in plan.resume]
    rows += [("purged" if done else "purge", f"{item.ref} (resume)", size(item.size or 0), f"in the trash since {item.since:%Y-%m-%d %H:%M}", item.id) for item in plan.resume_overdue]
    rows += [("removed" if done else "remove", path.name, "", "left by a writer that is gone", str(path.parent)) for path in plan.leftovers]
    rows += [("kept", item.ref, size(item.size), plan.why[item.id], item.id) for item in plan.kept]
    if rows:
        print("\n".join(table([("", "REF", "SIZE", "WHY", "ID"), *rows])))
    waiting = f"; {len(plan.waiting)} wait in the trash" if plan.waiting else ""
    print(f"{len(plan.kept)} kept, {len(going)} {'trashed' if done else 'would go to the trash'} ({size(sum(item.size for item in going))}){waiting}")
    if going or plan.resume:
        print(f"when the trash is emptied, {size(free.later)} {'become' if done else 'would become'} free: what others hold too stays")
    if plan.overdue or plan.resume_overdue:
        print(f"{size(free.now)} {'are' if done else 'would be'} free at once, of what is purged")
    if done is None and (plan.going or plan.resume or plan.resume_overdue or plan.overdue or plan.returning or plan.leftovers):
        print(f"nothing was changed; to do it: {shlex.join(['align', *sys.argv[1:], '--apply'])}")
    elif done is not None and done.trashed:
        print(f"until the grace ends they can be brought back: align registry restore ID --registry {args.registry}")


def run_resume(args: argparse.Namespace) -> int:
    """Write the resumable state of a published run to an output folder."""
    from stages.registry import Registry, resumable

    save = resumable.restore(Registry(args.registry, create=False), args.ref, args.folder)
    told = f"wrote {save}; a run of the same config with output: {args.folder} goes on from it (what may differ: --allow-changed)"
    print_json({"ref": args.ref, "save": str(save)}) if args.json else print(told)
    return 0
