"""Scale and size of the registry: 10,000 checkpoints, what is stored once, and how fast contents are verified."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

from stages.registry import Registry, index
from tests.reliability import many
from tests.reliability.case import Case, Measured
from tests.unit.registry_samples import publish


def ten_thousand(folder: Path, seed: int, quick: bool) -> Measured:
    """Cold scan, cached list, names, resolve and publish in one registry; the best of a few runs of each."""
    count = 500 if quick else 10_000
    with mock.patch.dict(os.environ, {"XDG_CACHE_HOME": many.place_of(folder)}):
        registry = Registry(folder / "registry")
        many.fill(registry, count)
        cold = _milliseconds(lambda: _listed(registry, count), 2, before=lambda: index.index_file(registry.root).unlink(missing_ok=True))
        cached = _milliseconds(lambda: _listed(registry, count), 9)
        names = _milliseconds(registry.families, 9)
        resolve = _milliseconds(lambda: registry.resolve("sft/real"), 9)
        added = _milliseconds(lambda: publish(registry), 3)
        seen = _listed(registry, count + 3)
    ok = cold <= 4000 and cached <= 50 and names <= 10 and seen
    value = f"names {names:.2f} ms, cached list {cached:.0f} ms, cold scan {cold / 1000:.2f} s"
    return Measured(value, ok, f"{count} checkpoints in {many.NAMES + 1} names; resolve {resolve:.1f} ms, publish {added:.0f} ms; index on a local disk; best of 2 to 9 runs")


def _listed(registry: Registry, count: int) -> bool:
    rows = [(item.ref, item.id, item.size) for item in registry.list()]
    assert len(rows) == count, (len(rows), count)
    return True


def _milliseconds(work: Callable[[], object], times: int, before: Callable[[], object] = lambda: None) -> float:
    spent = []
    for _ in range(times):
        before()
        start = time.perf_counter()
        work()
        spent.append((time.perf_counter() - start) * 1000)
    return min(spent)


CASES = [
    Case("a registry of 10,000 checkpoints", "names ≤ 10 ms, cached list ≤ 50 ms, cold scan ≤ 4 s", ten_thousand, "in process, real files"),
]
