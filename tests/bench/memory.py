"""Peak memory of PPO beside that of LoRA SFT, on the same model, rows and micro-batch. Each case runs in a process of its own.

python -m tests.bench.memory [--repeats N] [--world small|wide] [--out FILE]

Counted is the highest resident memory of the process above what it has after its imports, from loading to publishing
(tests/bench/peak.py). Every completion has its full length, so that the rows of PPO are those of SFT. Ratios are to `lora_sft`,
which is the SFT stage itself; `lora_sft_bare` is the leanest loop we can write: no trainer, no logging, no publishing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PROMPT = COMPLETION = 64  # tokens
ROWS, MICRO_BATCH, RANK = 32, 8, 16
WORLDS = {"small": {"layers": 8, "hidden": 512, "vocabulary": 8192}, "wide": {"layers": 8, "hidden": 512, "vocabulary": 32000}}
CASES = ("lora_sft", "lora_sft_bare", "ppo_one_backbone", "full_sft", "ppo_four_models")
PEER = "lora_sft"


def main() -> None:
    """Measure every case of every world, print a table, write a list of JSON records."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--world", choices=list(WORLDS), action="append", help="which models; all by default")
    parser.add_argument("--case", choices=CASES, action="append", help="which cases; all by default")
    parser.add_argument("--repeats", type=int, default=2, help="processes per case; the median counts")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/ppo_memory.json"))
    parser.add_argument("--measure", nargs=2, metavar=("CASE", "FOLDER"), help=argparse.SUPPRESS)
    parser.add_argument("--prepare", nargs=2, metavar=("WORLD", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.prepare:
        prepare(Path(options.prepare[1]), **WORLDS[options.prepare[0]])
    elif options.measure:
        measure(options.measure[0], Path(options.measure[1]))
    else:
        records = [record for world in options.world or WORLDS for record in compare(world, options.case or list(CASES), options.repeats)]
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(records, indent=1) + "\n")


def compare(world: str, cases: list[str], repeats: int) -> list[dict[str, Any]]:
    """The records of one world: peak memory of each case, MiB, and its ratio to the peer's."""
    with tempfile.TemporaryDirectory() as folder:
        _child("--prepare", world, folder)
        records: list[dict[str, Any]] = []
        for case in dict.fromkeys([PEER, *cases]):
            found = [round(float(_child("--measure", case, folder).splitlines()[-1]), 1) for _ in range(repeats)]
            middle = statistics.median(found)
            ratio = middle / (records[0]["peak_mib"] if records else middle)
            print(f"{world:6} {case:18} {middle:8.0f} MiB  {ratio:5.2f} x {PEER}   runs: {', '.join(map(str, found))}", flush=True)
            records.append({"case": f"{case}/{world}", "memory_ratio": round(ratio, 3), "peak_mib": middle, "runs_mib": found, "against": PEER,
                            "model": WORLDS[world], "rows": ROWS, "micro_batch_size": MICRO_BATCH, "tokens": [PROMPT, COMPLETION], "lora_rank": RANK})  # fmt: skip
    return records


def _child(*arguments: str) -> str:
    """What a fresh process printed."""
    from tests.bench.peak import environment

    done = subprocess.run([sys.executable, "-m", "tests.bench.memory", *arguments], env=environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(arguments)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done.stdout


def prepare(folder: Path, layers: int, hidden: int, vocabulary: int) -> None:
    """A random Llama as sft/one, two reward models on it (an adapter and a whole one), demonstrations and prompts."""
    from tests.stage.ppo_runs import publish_policy, publish_reward
    from tests.tiny import tiny_model

    sizes = {"hidden": hidden, "layers": layers, "vocabulary": vocabulary, "intermediate_size": 8 * hidden // 3, "num_attention_heads": 8, "num_key_value_heads": 8}
    tiny_model(folder / "base", **sizes)
    publish_policy(folder, "one")
    publish_reward(folder, "whole")
    publish_reward(folder, "adapter", lora=True)
    letters = "abcdefghijklmnopqrstuvwxyz"
    text = lambda i, length: "".join(letters[(i * 7 + j * j) % 26] for j in range(length))  # noqa: E731
    rows = [{"prompt": f"{i:04d}{text(i, PROMPT - 4)}", "completion": text(i + 3, COMPLETION - 1)} for i in range(ROWS)]
    (folder / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in rows))


def settings(case: str, folder: Path) -> dict[str, Any]:
    """The stage config of a case."""
    common = {"name": case.replace("_", "-"), "registry": str(folder / "registry"), "output": str(folder / f"out-{case}"), "init_from": "sft/one",
              "split": {"validation": 0, "test": 0}, "max_length": PROMPT + COMPLETION}  # fmt: skip
    lora = {"lora": {"rank": RANK, "alpha": 32}} if case in ("lora_sft", "ppo_one_backbone") else {}
    if case.endswith("sft"):
        return common | lora | {"data": str(folder / "sft.jsonl"), "train": {"max_steps": 2, "batch_size": ROWS, "micro_batch_size": MICRO_BATCH, "epochs": 2}}
    reward = "adapter" if case == "ppo_one_backbone" else "whole"
    train = {"iterations": 1, "rollout_batch_size": ROWS, "num_ppo_epochs": 2, "micro_batch_size": MICRO_BATCH}
    return common | lora | {
        "prompts": str(folder / "prompts.jsonl"), "scorers": [{"kind": "model", "checkpoint": f"reward/{reward}"}], "train": train,
        "sampling": {"max_new_tokens": COMPLETION, "stop_at_eos": False},
    }  # fmt: skip


def measure(case: str, folder: Path) -> None:
    """Run a case in this process; the last line printed is its peak above the imports, MiB."""
    import datasets  # noqa: F401 - all that any case imports, so that no import counts
    import peft  # noqa: F401
    import trl  # noqa: F401
    from transformers import LlamaForCausalLM, LlamaForSequenceClassification  # noqa: F401
    from trl import SFTTrainer  # noqa: F401

    import stages.ppo.train
    import stages.sft
    from configs.schema import PPOStage, SFTStage
    from stages import models
    from tests.bench.peak import baseline, peak

    before = baseline()
    if case == "lora_sft_bare":
        bare_sft(folder)
    elif case.endswith("sft"):
        stages.sft.main(models.pinned(SFTStage.model_validate(settings(case, folder))))
    else:
        stages.ppo.train.main(models.pinned(PPOStage.model_validate(settings(case, folder))))
    print(peak() - before)


def bare_sft(folder: Path) -> None:
    """LoRA SFT as little as it can be: forward, cross-entropy of the completions in chunks, backward, AdamW."""
    import torch
    from peft import get_peft_model

    from configs.schema import Lora
    from stages import models
    from stages.ppo.forward import hidden_states, token_outputs
    from stages.ppo.rollout import Tokens
    from stages.tuning.adapters import lora_config

    model = get_peft_model(models.load_policy(models.find("sft/one", folder / "registry")), lora_config(Lora(rank=RANK, alpha=32), "CAUSAL_LM"))
    backbone = model.get_base_model()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    ids = torch.randint(3, 256, (ROWS, PROMPT + COMPLETION), generator=torch.Generator().manual_seed(0))
    real = torch.ones(MICRO_BATCH, PROMPT, dtype=torch.bool)
    for _ in range(2):
        for part in ids.split(MICRO_BATCH):
            tokens = Tokens(part[:, :PROMPT], real, part[:, PROMPT:], real)
            token_outputs(backbone, hidden_states(backbone.base_model, tokens), tokens, temperature=1.0).logprobs.mean().neg().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


if __name__ == "__main__":
    main()
