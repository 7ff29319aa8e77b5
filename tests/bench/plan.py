"""`align plan` against what stages really allocate: predicted and measured peak of every stage, kind, ZeRO stage and model size, on the CPU.

python -m tests.bench.plan [--world 1M] [--layout one] [--case sft:full] [--out FILE] [--add | --predict]

Predicted is what `align plan` says of the stage's config; measured is the highest sum of torch's storages in the stage itself, of the rank that
has most (tests/bench/plan_worker.py). Beside it stands resident memory above the imports, which also holds what Python, Arrow and allocators keep.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.bench import plan_cases as cases


def main() -> None:
    """Measure and predict every case, print a table, write a list of JSON records."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--world", choices=list(cases.WORLDS), action="append", help="model sizes; all by default")
    parser.add_argument("--layout", choices=list(cases.LAYOUTS), action="append", help="machines; all by default")
    parser.add_argument("--case", metavar="STAGE:KIND", action="append", help="such as sft:full; all by default")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/plan.json"))
    parser.add_argument("--predict", action="store_true", help="measure nothing: what FILE has measured against what the plan says now")
    parser.add_argument("--add", action="store_true", help="keep what FILE has of other cases: a run in parts")
    options = parser.parse_args()
    wanted = options.case or [f"{stage}:{kind}" for stage in cases.STAGES for kind in cases.KINDS]
    records: dict[str, dict[str, Any]] = {}
    if (options.add or options.predict) and options.out.is_file():
        records = {record["case"]: record for record in json.loads(options.out.read_text())}
    for world in options.world or cases.WORLDS:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            _python("from tests.bench.plan_cases import prepare; from pathlib import Path; import sys; prepare(Path(sys.argv[1]), sys.argv[2])", place, world)
            for layout in options.layout or cases.LAYOUTS:
                records |= {record["case"]: record for record in compare(folder, world, layout, wanted, records if options.predict else None)}
                options.out.parent.mkdir(parents=True, exist_ok=True)
                options.out.write_text(json.dumps(list(records.values()), indent=1) + "\n")
    print("\n".join(summary(list(records.values()))))


def summary(records: list[dict[str, Any]]) -> list[str]:
    """Median and worst error of what was predicted and of what the plan's rules were fitted to, and the cells above 10 %."""
    lines = []
    for what, fitted in (("predicted", False), ("fitted", True)):
        errors = [record["error"] for record in records if (record["case"] in cases.FITTED) == fitted]
        if errors:
            lines.append(f"{len(errors)} cells {what}: median error {statistics.median(errors):.1%}, worst {max(errors):.1%}")
    bad = [f"{record['case']} {record['error']:.1%}" for record in records if record["error"] > 0.1]
    return [*lines, f"above 10 %: {', '.join(bad) or 'none'}; {len(records)} of {len(cases.WORLDS) * len(cases.LAYOUTS) * len(cases.STAGES) * len(cases.KINDS)} cells measured"]


def compare(folder: Path, world: str, layout: str, chosen: list[str], known: dict[str, dict[str, Any]] | None = None) -> list[dict[str, Any]]:
    """The records of one world and layout: bytes, and |predicted - measured| / measured. `known`: records whose measurements are taken over."""
    machine = cases.machine(folder, layout)
    chosen = [case for case in chosen if known is None or _case(*case.split(":"), layout, world) in known]
    if not chosen:
        return []
    measured = measure(folder, world, layout, chosen, machine) if known is None else {(s, k): known[_case(s, k, layout, world)] for s, k in (case.split(":") for case in chosen)}
    predicted = json.loads(_python("from tests.bench.plan import predict; import sys; predict(*sys.argv[1:])", str(folder), layout, str(machine), *chosen).splitlines()[-1])
    records = []
    for (stage, kind), found in measured.items():
        guess, case = predicted[f"{stage}:{kind}"], _case(stage, kind, layout, world)
        error = abs(guess["peak_bytes"] - found["measured"]) / found["measured"]
        print(f"{case:24} predicted {guess['peak_bytes'] / 2**20:8.1f} MiB in {guess['peak_phase']:28} measured {found['measured'] / 2**20:8.1f} ({found.get('operation', '–'):36}) error {error:6.1%}   resident {found['resident'] / 2**20:8.1f}", flush=True)
        records.append({"case": case, "predicted": guess["peak_bytes"], "measured": found["measured"], "error": round(error, 4), "fitted": case in cases.FITTED,
                        "resident": found["resident"], "phase": guess["peak_phase"], "parts": guess["parts_bytes"]})  # fmt: skip
    return records


def _case(stage: str, kind: str, layout: str, world: str) -> str:
    return f"{cases.name_of(stage, kind)}/{layout}/{world}"


def measure(folder: Path, world: str, layout: str, chosen: list[str], machine: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """(stage, kind) -> what the stage took on the rank that took most."""
    processes = 1 if layout == "one" else cases.PROCESSES
    for part in parts(chosen, processes):
        launch = ["-m", "tests.bench.plan_worker", str(folder), layout, *part]
        if processes > 1:
            launch = ["-m", "accelerate.commands.launch", "--config_file", str(machine), "--num_processes", str(processes), "--main_process_port", "0", *launch]
        _run([sys.executable, *launch])
    measured: dict[tuple[str, str], dict[str, Any]] = {}
    for rank in range(processes):
        for line in (folder / f"measured-{layout}-{rank}.jsonl").read_text().splitlines():
            found = json.loads(line)
            key = (found["stage"], found["kind"])
            if "failed" in found:
                sys.exit(f"{world}/{layout}/{key}: {found['failed']}")
            if key not in measured or found["measured"] > measured[key]["measured"]:
                measured[key] = found
    return measured


def parts(chosen: list[str], processes: int) -> list[list[str]]:
    """The cases that share processes: all of them alone, of one stage under DeepSpeed, which leaves things behind in a process."""
    stages = dict.fromkeys(case.partition(":")[0] for case in chosen)
    return [[case for case in chosen if case.startswith(f"{stage}:")] for stage in stages] if processes > 1 else [chosen]


def predict(folder: str, layout: str, machine: str, *chosen: str) -> None:
    """Print what the plan says of the cases, as one JSON object."""
    from configs import schema
    from launch.plan.gpus import CPU
    from launch.plan.make import plan
    from launch.plan.report import record

    out = {}
    for case in chosen:
        stage, kind = case.split(":")
        model = getattr(schema, {"sft": "SFTStage", "reward": "RewardStage", "dpo": "DPOStage", "ppo": "PPOStage"}[stage])
        cfg = model.model_validate(cases.settings(Path(folder), stage, kind, layout))
        plans, _ = plan(cfg, stage, gpus=1 if layout == "one" else cases.PROCESSES, device=CPU, nodes=1, machine=machine, knobs=False)
        out[case] = record(plans[0])
    print(json.dumps(out))


def _python(code: str, *arguments: str) -> str:
    return _run([sys.executable, "-c", code, *arguments])


def _run(command: list[str]) -> str:
    """What a fresh process printed."""
    from tests.bench.peak import environment

    done = subprocess.run(command, env=environment() | {"PYTHONPATH": os.getcwd()}, capture_output=True, text=True, check=False, timeout=3600)
    if done.returncode not in (0, -6):  # DeepSpeed on a CPU may abort in a process's exit, after all work
        print(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}", file=sys.stderr)
    return done.stdout


if __name__ == "__main__":
    main()
