"""`align registry import`, `export` and `push`: models into the registry and out of it."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from configs.printable import printable
from launch.registry.output import print_json, size, table

if TYPE_CHECKING:
    from stages.registry.exporting import Options


def run_import(args: argparse.Namespace) -> int:
    """Publish a model from outside."""
    from stages.registry import Registry
    from stages.registry.importing import import_model

    registry = Registry(args.registry)
    checkpoint = import_model(registry, args.source, args.family, base=args.base, template=args.template, revision=args.revision, say=_tell)
    facts = {"ref": checkpoint.ref, "id": checkpoint.id, "path": str(checkpoint.path), "size": checkpoint.size, "notes": checkpoint.info("notes")}
    told = f"imported {args.source} as {checkpoint.ref} ({checkpoint.id}, {size(checkpoint.size)}); now: init_from: {checkpoint.ref}"
    print_json(facts) if args.json else print(told)
    return 0


def _tell(line: str) -> None:
    print(line, file=sys.stderr)


def run_export(args: argparse.Namespace) -> int:
    """Write a checkpoint to a folder of its own."""
    from stages.registry import Registry
    from stages.registry.exporting import export
    from stages.registry.loading import is_stacked, stacked_lines

    done = export(Registry(args.registry, create=False), args.ref, args.folder, _options(args), _tell)
    facts = {
        "ref": done.checkpoint.ref, "id": done.checkpoint.id, "path": str(done.folder), "licence": done.licence, "difference": done.difference, "files": done.files,
    }  # fmt: skip
    if args.json:
        print_json(facts)
        return 0
    print(f"exported {done.checkpoint.ref} ({done.checkpoint.id}) to {done.folder}: {len(done.files)} files, {size(sum(done.files.values()))}")
    if is_stacked(done.checkpoint):
        print("\n".join(["to load it (BASE, if there is one: see README.md):", *map(printable, stacked_lines(done.checkpoint, str(done.folder), "BASE"))]))
    if done.licence is None:
        print(f"its licence is not known: fill it in at the top of {done.folder / 'README.md'}, or export again with --licence")
    return 0


def run_push(args: argparse.Namespace) -> int:
    """Show what would go to the hub, or with --yes send it."""
    from stages.registry import Registry, pushing

    registry = Registry(args.registry, create=False)
    if args.yes:
        sent = pushing.push(registry, args.ref, args.repo, _options(args), private=not args.public, say=_tell)
    else:
        sent = pushing.plan(registry, args.ref, args.repo, _options(args), private=not args.public)
    if args.json:
        print_json({**vars(sent), "sent": args.yes})
        return 0
    seen = "private" if sent.private else "public"
    print(f"{'sent' if args.yes else 'would send'} {sent.ref} to {sent.repo} ({seen}), licence {sent.licence or 'not stated: give --licence'}:")
    print("\n".join(table([(f"  {name}", size(count) if count is not None else "written on the way") for name, count in sent.files.items()])))
    print(sent.url if args.yes else "nothing was sent; to send it add --yes")
    return 0


def _options(args: argparse.Namespace) -> Options:
    from stages.registry.exporting import Options

    return Options(args.merge, args.dtype, args.licence, args.samples)
