"""Health of the checkpoint registry: it opens, what it holds, and whether the newest checkpoints are whole."""

from __future__ import annotations

from collections import Counter

from configs.errors import UserError
from launch.doctor.check import Findings, Settings

NEWEST = 5


def check_registry(settings: Settings) -> Findings:
    """Open, count, verify the newest quickly (manifest, files, sizes)."""
    from stages.registry import Registry

    found = Findings()
    if not settings.registry.exists() and not settings.named:
        found.summary = f"none at {settings.registry} yet; a stage makes it (another: --registry DIR)"
        return found
    try:
        registry = Registry(settings.registry, create=False)
        checkpoints, damaged = registry.list(), registry.damaged()
    except UserError as error:
        found.fail(str(error), "name the registry's folder with --registry, or restore it from a backup")
        return found
    newest = sorted(checkpoints, key=lambda item: item.manifest["created"])[-NEWEST:]
    problems = {item.ref: registry.verify(item.id) for item in newest}
    counts = Counter(item.stage for item in checkpoints)
    found.facts = {
        "folder": str(settings.registry), "checkpoints": dict(sorted(counts.items())), "newest": [item.ref for item in reversed(newest)],
        "size [GiB]": round(sum(item.size for item in checkpoints) / 2**30, 3), "damaged": len(damaged),
    }  # fmt: skip
    held = ", ".join(f"{count} {stage}" for stage, count in sorted(counts.items())) or "empty"
    found.summary = f"opens; {held}; the newest {len(newest)} are whole" if newest else f"opens; {held}"
    see = f"align registry verify --deep --registry {settings.registry}"
    for checkpoint, problem in damaged.items():
        found.warn(f"checkpoint {checkpoint} is damaged: {problem}", f"see {see}; train it again or restore it")
    for ref, items in problems.items():
        if items:
            found.fail(f"{ref} is damaged: {items[0]}", f"see {see}; train it again (align run CHAIN.yaml --from {ref.partition('/')[0]})")
            found.summary = f"opens; {held}; damage among the newest"
    return found
