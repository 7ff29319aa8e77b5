"""PPO against TRL 1.12's PPOTrainer: `make bench-ppo`, or `python -m tests.bench.ppo --peer FOLDER_OF_TRL`.

Each measurement is a process of its own with one thread, and the two sides take turns, so that a machine that is busier for
a while is so for both. Reported are medians over the updates of all rounds; a process's first update is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tests.bench.cases import CASES, Case, tiny
from tests.bench.results import entry, show, table, write

ROOT = Path(__file__).parents[2]
RUNS = (("ours", "full"), ("peer", "full"), ("ours", "lora"), ("peer", "lora"))
PEER = Path("runs/bench/trl-1.12")


def main(argv: list[str] | None = None) -> int:
    """Measure, print the table, write the JSON. Returns the exit status: 2 where the benchmark can't run."""
    args = parser().parse_args(argv)
    problem = peer_problem(args.peer)
    if problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    entries: list[dict[str, Any]] = []
    for case in chosen(args):
        entries += measure_case(case, args)
        write(args.out, entries)
    show(args.out, table(entries))
    return 0


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    made = argparse.ArgumentParser(prog="python -m tests.bench.ppo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--cases", nargs="+", choices=sorted(CASES), help="default: stories260K vocab32k, and llama1b where there is a GPU")
    made.add_argument("--rounds", type=int, default=3, help="processes per side and mode (default 3)")
    made.add_argument("--updates", type=int, help="measured updates per process; default: the case's own")
    made.add_argument("--quick", action="store_true", help="one round of next to no work: shows that it runs, measures nothing")
    made.add_argument("--model", help="a Hugging Face folder in place of the random model of stories260K")
    made.add_argument("--prompt-tokens", nargs=2, type=int, metavar=("SHORTEST", "LONGEST"), help="default: the case's own")
    made.add_argument("--peer", type=Path, default=PEER, help=f"folder with trl 1.12 (default {PEER}, where make bench-ppo puts it)")
    made.add_argument("--out", type=Path, default=Path("runs/bench/ppo.json"), help="default runs/bench/ppo.json")
    made.add_argument("--modes", nargs="+", choices=["full", "lora"], default=["full", "lora"], help="what ours is measured as (the peer's full training always is)")
    return made


def peer_problem(folder: Path) -> str | None:
    """Why there is no peer in this folder, and what to do."""
    if (folder / "trl" / "experimental" / "ppo" / "ppo_trainer.py").is_file():
        return None
    return f"no trl 1.12 in {folder}; run `make bench-ppo`, or: pip install --no-deps --target {folder} trl==1.12.0"


def chosen(args: argparse.Namespace) -> list[Case]:
    """The cases to measure, with what the command line changes."""
    names = args.cases or [name for name, case in CASES.items() if not case.gpu or _has_gpu()]
    cases = []
    for case in (CASES[name] for name in names):
        case = replace(case, prompt_tokens=tuple(args.prompt_tokens or case.prompt_tokens), updates=args.updates or case.updates)
        cases.append(tiny(case) if args.quick else case)
    return cases


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def measure_case(case: Case, args: argparse.Namespace) -> list[dict[str, Any]]:
    """All rounds of a case: its entries of the JSON file."""
    runs = [(side, mode) for side, mode in RUNS if mode in args.modes or (side, mode) == ("peer", "full")]
    found: dict[tuple[str, str], list[dict[str, Any]]] = {run: [] for run in runs}
    with tempfile.TemporaryDirectory(prefix="bench-ppo-") as place:
        job = Path(place) / "job.json"
        worker("prepare", job, "--case", json.dumps(asdict(case)), *(["--model", args.model] if args.model and case.name == "stories260K" else []))
        for number in range(1 if args.quick else args.rounds):
            for side, mode in runs if number % 2 == 0 else runs[::-1]:
                result = Path(place) / "result.json"
                worker(side, job, "--mode", mode, "--out", str(result), peer=args.peer if side == "peer" else None)
                found[side, mode].append(json.loads(result.read_text()))
                shutil.rmtree(Path(place) / "out", ignore_errors=True)
                seconds = [round(update["seconds"], 2) for update in found[side, mode][-1]["updates"]]
                print(f"{case.name} round {number + 1}: {side} {mode}: {seconds} s an update, the first not counted", flush=True)
    pairs = [pair for pair in ((("ours", "full"), ("peer", "full")), (("ours", "lora"), ("peer", "full")), (("ours", "lora"), ("peer", "lora"))) if pair[0] in found]
    return [entry(asdict(case), ours, peer, found[ours], found[peer]) for ours, peer in pairs]


def worker(side: str, job: Path, *arguments: str, peer: Path | None = None) -> None:
    """Run one process to its end; what it says is shown only where it fails.

    Raises:
        SystemExit: it failed.
    """
    path = [str(peer.resolve())] if peer else []
    environment = os.environ | {
        "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1",
        "PYTHONPATH": os.pathsep.join([*path, str(ROOT)]),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench.ppo_worker", side, "--job", str(job), *arguments], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{side} failed with status {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")


if __name__ == "__main__":
    sys.exit(main())
