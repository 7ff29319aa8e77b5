"""Stands in for a stage in tests of the chain: publishes a tiny checkpoint, or misbehaves as FAKE_DIR/behaviour.json says.

python fake_stage.py KIND NAME CONFIG: NAME is the step, such as reward-2 for a further member of a reward ensemble
"""

import json
import os
import sys
import time
from pathlib import Path

import yaml

kind, name, config_file = sys.argv[1:]
folder = Path(os.environ["FAKE_DIR"])
with (folder / "calls.txt").open("a") as calls:
    calls.write(f"{name}\n")
cfg = yaml.safe_load(Path(config_file).read_text())
output = Path(cfg["output"])
plan = folder / "behaviour.json"
behaviour = json.loads(plan.read_text()).get(name) if plan.exists() else None
if behaviour == "user error":
    print("error: data.jsonl:3: no prompt", file=sys.stderr)
    sys.exit(2)
if behaviour == "crash":
    raise ZeroDivisionError("not the user's fault")
resume = output / "resume"
print(f"{name} starts at {int(resume.read_text()) if resume.exists() else 0}", flush=True)
if behaviour == "hang":
    resume.write_text("40")
    print(f"pid {os.getpid()}", flush=True)
    time.sleep(120)
if behaviour == "publish nothing":
    sys.exit(0)
print(f"{name} 1/2  loss 0.5", flush=True)

if kind == "eval":
    measured = {
        label: {
            "checkpoint": ref, "id": None, "score": {"mean": number / 10, "se": 0.01}, "win_rate": 0.5, "win_rate_ci": [0.4, 0.6],
            "kl": {"k1": 0.5, "k1_se": 0.1, "k3": 0.5, "k3_se": 0.1}, "length": 10.0, "eos_rate": 1.0, "perplexity": None, "n": 3, "prompts": 3,
        }
        for number, (label, ref) in enumerate(cfg["checkpoints"].items(), 1)
    }  # fmt: skip
    result = {"eval_set": "x", "eval_set_detail": {"subset": "test"}, "against": cfg["against"], "reference": cfg["reference"]}
    (output / "results.json").write_text(json.dumps(result | {"models": measured, "samples": []}))

else:
    from stages.registry import Registry

    def write(model_dir: Path) -> None:
        (model_dir / "config.json").write_text(json.dumps({"made by": config_file, "init_from": cfg["init_from"]}))

    stage = name.partition("-")[0]
    metrics = {"accuracy": 0.8 if name == "reward" else 0.6, "best_shortcut": 0.7, "ece": 0.05} if stage == "reward" else {}
    info = {"inputs_key": os.environ["ALIGN_INPUTS_KEY"], "config": cfg, "metrics": metrics}
    if behaviour == "abort before publishing":
        os.abort()
    Registry(cfg["registry"]).publish(stage, cfg["name"], write, info=info)
    if behaviour == "abort":
        os.abort()
    if behaviour == "worker aborts":  # what torch's elastic agent says of a worker that aborted, and how it ends then
        print("E1122 22:30:17.239000 12230 torch/distributed/elastic/multiprocessing/api.py:1002] failed (exitcode: -6) local_rank: 0 (pid: 7)")
        sys.exit(1)
    if behaviour == "fails late":
        raise ZeroDivisionError("not the user's fault, and no signal")
