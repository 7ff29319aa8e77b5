"""`make reliability`: run every case of every area, print the table, write RELIABILITY.md and runs/reliability.json."""

from __future__ import annotations

import argparse
import importlib
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.reliability import page
from tests.reliability.case import Case, Measured

# One name a line, in the order in which they run: tests/reliability/<name>.py
AREAS: tuple[str, ...] = (
    "faults",
    "save_faults",
    "small",
    "collection",
    "security",
    "runs",
    "saves",
    "signals",
    "numbers",
)  # fmt: skip
ROOT = Path(__file__).resolve().parents[2]
CASE_LIMIT = 1200  # seconds after which a case counts as hung


def cases_of(area: str) -> list[Case]:
    """The cases of an area; one that fails in place of a module that cannot be imported."""
    try:
        return list(importlib.import_module(f"tests.reliability.{area}").CASES)
    except Exception as error:
        told = f"{type(error).__name__}: {error}"

        def unreadable(folder: Path, seed: int, quick: bool) -> Measured:
            return Measured("could not be imported", False, told)

        return [Case(f"the area {area}", "its cases run", unreadable, "nothing ran")]


def run_case(area: str, case: Case, seed: int, quick: bool, scratch: Path) -> dict[str, Any]:
    """One entry of the results. Whatever the case raises becomes a failed entry; its traceback goes to stderr."""

    def hung(*_: Any) -> None:
        raise TimeoutError(f"not done after {CASE_LIMIT} seconds")

    scratch.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{area}-", dir=scratch))
    began = time.monotonic()
    before = signal.signal(signal.SIGALRM, hung)
    signal.alarm(CASE_LIMIT)
    try:
        measured = case.run(folder, seed, quick)
    except Exception as error:
        traceback.print_exc()
        text = str(error).replace(str(folder), "FOLDER").replace(str(ROOT), ".")
        measured = Measured("raised", False, f"{type(error).__name__}: {text[:500]}")
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        shutil.rmtree(folder, ignore_errors=True)
    return {
        "test": case.name, "target": case.target, "value": measured.value, "ok": bool(measured.ok), "seed": seed,
        "seconds": round(time.monotonic() - began, 1), "detail": measured.detail, "where": case.where, "area": area,
    }  # fmt: skip


def run_all(areas: list[str], seed: int, quick: bool, scratch: Path) -> Iterator[tuple[list[dict[str, Any]], int]]:
    """The results so far and how many cases there are in all, once before the first case and again after each."""
    cases = [(area, case) for area in areas for case in cases_of(area)]
    results: list[dict[str, Any]] = []
    yield results, len(cases)
    for area, case in cases:
        print(f"{area}: {case.name} …", file=sys.stderr, flush=True)
        results.append(run_case(area, case, seed, quick, scratch))
        print(f"  {page.one_line(results[-1])}", file=sys.stderr, flush=True)
        yield results, len(cases)


def main(words: list[str] | None = None, root: Path = ROOT, areas: tuple[str, ...] = AREAS) -> int:
    """Exit status 0 when every case met its target. What is done is on disk after every case, marked as partial until the last."""
    parser = argparse.ArgumentParser(prog="python -m tests.reliability", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small versions, to show that everything runs; does not touch RELIABILITY.md")
    parser.add_argument("--only", nargs="+", choices=areas, default=list(areas), metavar="AREA", help=f"of {', '.join(areas)}; does not touch RELIABILITY.md")
    parser.add_argument("--add", action="store_true", help="keep what runs/reliability.json has of the other areas; each row names the commit that it ran on")
    parser.add_argument("--seed", type=int, default=0, help="from which every random choice follows (default 0)")
    asked = parser.parse_args(words)
    kept = [made for made in page.earlier(root / "runs" / "reliability.json") if made["area"] not in asked.only] if asked.add else []
    whole = not asked.quick and {*asked.only, *(made["area"] for made in kept)} == set(areas)
    if whole:
        options = [*(["--seed", str(asked.seed)] if asked.seed else []), *(["--add --only", *asked.only] if kept else [])]
        command = "make reliability" + (f" ARGS='{' '.join(options)}'" if options else "")
    else:
        command = f"python -m tests.reliability{' --quick' if asked.quick else ''} --only {' '.join(asked.only)} --seed {asked.seed}"
    print(f"seed {asked.seed}; results after every case: runs/reliability.json{' and RELIABILITY.md' if whole else ''}", file=sys.stderr)
    header = page.header(command, asked.seed, root)
    results: list[dict[str, Any]] = []
    ran_on = page.commit(root)
    for made, count in run_all(asked.only, asked.seed, asked.quick, root / "runs" / "reliability"):
        fresh = [{**entry, "commit": ran_on, "quick": asked.quick} for entry in made]
        results, count = sorted([*kept, *fresh], key=lambda entry: areas.index(entry["area"])), count + len(kept)
        page.write(root / "runs" / "reliability.json", page.as_json(results, count))
        if whole:
            page.write(root / "RELIABILITY.md", page.as_markdown(results, count, header))
    page.show(results)
    return 0 if all(made["ok"] for made in results) else 1


if __name__ == "__main__":
    sys.exit(main())
