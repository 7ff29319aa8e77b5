"""Security, measured: every hostile input of the table tried, and canaries looked for in all that a real chain writes and prints."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from stages.registry import Registry
from stages.registry.exporting import export
from tests.reliability.case import Case, Measured
from tests.security import canaries
from tests.security.attack import attempt
from tests.tiny import tiny_data, tiny_model

ROOT = Path(__file__).resolve().parents[2]
CHAIN = """
name: tiny
base: {folder}/base
output: {folder}/out
max_length: 96
template: plain
split: {{validation: 0.1, test: 0.2}}
sft: {{data: {folder}/demos.jsonl, train: {{epochs: 1, batch_size: 16, micro_batch_size: 8, save_every: 1}}, trainer: {{report_to: tensorboard}}}}
reward: {{data: {folder}/pairs.jsonl, train: {{epochs: 1, batch_size: 16, micro_batch_size: 8, save_every: 1}}, trainer: {{report_to: tensorboard}}}}
dpo: {{data: {folder}/pairs.jsonl, train: {{epochs: 1, batch_size: 16, micro_batch_size: 8, save_every: 1}}, trainer: {{report_to: tensorboard}}}}
ppo:
  prompts: {folder}/prompts.jsonl
  sampling: {{max_new_tokens: 8}}
  train: {{iterations: 2, rollout_batch_size: 16, micro_batch_size: 8, num_ppo_epochs: 1}}
eval: {{prompts: {folder}/prompts.jsonl, sampling: {{max_new_tokens: 8}}, scorers: [{{kind: keyword, words: [please]}}]}}
"""


def hostile_inputs(folder: Path, seed: int, quick: bool) -> Measured:
    """Each attack in this process; a template that never ends gets one second."""
    from stages.data import trial
    from tests.security.test_attacks import TABLE

    sound = tiny_model(folder / "sound", hidden=16, layers=1)
    attacks = [attack for attack in TABLE if not attack.name.startswith("(control)")][:: 5 if quick else 1]
    before, trial.SECONDS = trial.SECONDS, 1.0
    sys.path.insert(0, str(folder))
    try:
        outcomes = [(attack, attempt(attack, folder / str(number), sound)) for number, attack in enumerate(attacks)]
    finally:
        trial.SECONDS = before
        sys.path.remove(str(folder))
    executed = sum(outcome.executed for _, outcome in outcomes)
    otherwise = [f"{attack.target}: {attack.name}" for attack, outcome in outcomes if outcome.wrong]
    ended = {kind: sum(outcome.ended == kind for _, outcome in outcomes) for kind in ("refused", "harmless")}
    detail = f"{ended['refused']} refused with a reason, {ended['harmless']} without effect" + (f"; not as expected: {'; '.join(otherwise)[:300]}" if otherwise else "")
    return Measured(f"{executed} of {len(outcomes)}", executed == 0 and not otherwise, detail)


def canaries_of_a_chain(folder: Path, seed: int, quick: bool) -> Measured:
    """`align run` of all stages with secrets in the environment and a canary in every prompt."""
    tiny_model(folder / "base", hidden=16, layers=1)
    tiny_data(folder, "mnop" if quick else "mnopqrst")
    canaries.plant(folder, "demos.jsonl", "pairs.jsonl", "prompts.jsonl")
    (folder / "chain.yaml").write_text(CHAIN.format(folder=folder))
    environment = os.environ | canaries.TOKENS | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "launch.cli", "run", str(folder / "chain.yaml")]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode != 0:
        return Measured("the chain failed", False, done.stderr.strip()[-300:])
    for stage in ("sft", "reward", "dpo", "ppo"):
        export(Registry(folder / "out" / "registry"), f"{stage}/tiny", folder / "out" / "export" / stage)  # with its model card
    files, leaks = canaries.found(folder / "out", printed=done.stdout + done.stderr)
    events = len(list(folder.glob("out/*/tensorboard/events.out.tfevents.*")))
    kinds = f"secrets and a prompt, as UTF-8, -16 and -32, base64, hex, reversed, packed; samples.jsonl may hold prompts; TensorBoard's event files of {events} of 3 stages are among them"
    return Measured(f"{len({leak.split(':')[0] for leak in leaks})} of {files}", not leaks and events == 3, "; ".join(leaks)[:300] or kinds)


CASES = [
    Case("hostile inputs that were executed", "0 of 60 or more", hostile_inputs, "the loaders themselves, in process"),
    Case("files of a whole chain that hold a secret or a prompt", "0", canaries_of_a_chain, "real processes"),
]
