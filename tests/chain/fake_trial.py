"""`align run` for tests of sweeps, with a stage that only pretends: its loss is lowest at a learning rate of 1e-3 and falls with every evaluation.

python -m tests.chain.fake_trial CHAIN.yaml --json      as `align run`
python -m tests.chain.fake_trial --stage STEP CONFIG    the stage; FAKE_DIR/behaviour.json {STEP: how} says how it misbehaves
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

EVALUATIONS = 4


def loss(cfg: dict[str, Any], evaluation: int) -> float:
    """(log10(learning rate) + 3)^2 + seed/1000 + 1/evaluation."""
    return (math.log10(cfg["train"]["learning_rate"]) + 3) ** 2 + cfg["seed"] / 1000 + 1 / evaluation


def stage(step: str, config_file: str) -> int:
    """Evaluate a few times, save after each, publish."""
    import yaml

    cfg = yaml.safe_load(Path(config_file).read_text())
    output, folder = Path(cfg["output"]), Path(os.environ["FAKE_DIR"])
    trial = output.parent.name
    with (folder / "calls.txt").open("a") as calls:
        calls.write(f"{trial}:{step}:{os.environ.get('OMP_NUM_THREADS')}\n")
    plan = folder / "behaviour.json"
    how = json.loads(plan.read_text()) if plan.exists() else {}
    told: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: told.append(number))
    if how.get("fail above", math.inf) < cfg["train"]["learning_rate"]:
        print(f"error: the loss is not finite at step {trial}", file=sys.stderr)
        return 2
    if trial in how.get("says", {}):
        print(how["says"][trial], file=sys.stderr)
        return 2
    if how.get("crash") == trial:
        raise ZeroDivisionError(f"in {trial}")
    state = output / "resume" / "checkpoint"
    done = int(state.read_text()) if state.exists() else 0
    for evaluation in range(done + 1, EVALUATIONS + 1):
        with (output / "metrics.jsonl").open("a") as lines:
            lines.write(json.dumps({"step": 10 * evaluation, f"{step}/eval_loss": loss(cfg, evaluation)}) + "\n")
        print(f"{step} {10 * evaluation}/{10 * EVALUATIONS}  loss {loss(cfg, evaluation):.4g}", flush=True)
        state.parent.mkdir(exist_ok=True)
        state.write_text(str(evaluation))
        while how.get("hang") == f"{trial}:{evaluation}" and not told:
            time.sleep(0.01)
        until = time.monotonic() + how.get("seconds", 0.0)
        while not told and time.monotonic() < until:
            time.sleep(0.01)
        if told:
            print("stopped because it was told to (SIGTERM)", flush=True)
            return 85
    _publish(step, cfg, EVALUATIONS)
    return 0


def _publish(step: str, cfg: dict[str, Any], evaluations: int) -> None:
    from stages.registry import Registry

    def write(model_dir: Path) -> None:
        (model_dir / "config.json").write_text(json.dumps({"init_from": cfg["init_from"], "output": cfg["output"]}))

    info = {"inputs_key": os.environ["ALIGN_INPUTS_KEY"], "config": cfg, "metrics": {"loss": loss(cfg, evaluations), "ece": 0.1}}
    Registry(cfg["registry"]).publish(step, cfg["name"], write, info=info)


def command_for(step: Any, file: Path, chain: Any) -> Any:
    """The real command for preparations, the fake for the stages."""
    from launch.chain.runner import step_command
    from launch.command import Command

    if step.kind == "prepare":
        return step_command(step, file, chain)
    return Command((sys.executable, "-m", "tests.chain.fake_trial", "--stage", step.name, str(file)), f"fake {step.name}", {})


if __name__ == "__main__":
    if sys.argv[1] == "--stage":
        sys.exit(stage(*sys.argv[2:]))
    from launch.chain import inputs
    from launch.chain.runner import run_chain

    inputs.code_digest = lambda module: "the fake stage's"  # half of the time of a run that trains nothing
    sys.exit(run_chain(sys.argv[1], [], command_for=command_for, as_json=True))
