"""`align registry import`, `export` and `push`: models into the registry and out of it."""

from __future__ import annotations

import argparse
import sys

from launch.registry.output import print_json, size


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
