"""What train.rehearsal saves and costs: `python -m tests.bench.rehearsal ASSETS [--seeds 0 1 2]`.

ASSETS holds models/stories260K_hf, data/sft/rasbt_instruction_data.json and data/text/tinystories_sample.txt. The story model learns short instructions; what
it forgets is the perplexity of three stories that no run trains on. General text is what the model itself writes before it is tuned, so none has to be kept.
Four cases per seed: weights 0.3 and 1 for an epoch of the task; no rehearsal for one epoch; none for as many optimizer steps as with it. The target:
forgetting at least halved at no more than 2 % of task loss (validation rows, nats per token), compared at equal steps.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from tests.bench.results import show, write

SAMPLES, TOKENS = 120, 250  # documents that the base model writes, and tokens of each
HELD_OUT = 3  # stories at the end of the sample, whose perplexity is measured
BATCH, GENERAL = 16, 2  # rows of an optimizer step, and how many of them are general text
WEIGHTS = {"weight 0.3": 0.3, "weight 1": 1.0}
EPOCH, EQUAL = "none, one epoch", "none, as many steps"


def main(argv: list[str] | None = None) -> int:
    """Train every case, print the table, write the JSON."""
    args = parser().parse_args(argv)
    work = args.out.parent / "rehearsal"
    work.mkdir(parents=True, exist_ok=True)
    texts = {"general": sampled(args.assets / "models" / "stories260K_hf", work / "samples.txt", args.samples)}
    texts["held_out"] = held_out(args.assets / "data" / "text" / "tinystories_sample.txt", work / "held_out.txt")
    found: list[dict[str, Any]] = []
    for seed in args.seeds:
        for case in (*WEIGHTS, EPOCH, EQUAL):
            steps = found[-2]["steps"] if case == EQUAL else None  # of weight 1
            found.append({"case": case, "seed": seed} | trained(settings(args.assets, work, case, seed, texts, args.max_steps or steps)))
            write(args.out, found)
            print(json.dumps(found[-1]), flush=True)
    show(args.out, table(found))
    return 0


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    made = argparse.ArgumentParser(prog="python -m tests.bench.rehearsal", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("assets", type=Path, help="folder with the model and the data")
    made.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one run of every case for each (default 0 1 2)")
    made.add_argument("--samples", type=int, default=SAMPLES, help=f"documents that the base model writes (default {SAMPLES})")
    made.add_argument("--max-steps", type=int, help="optimizer steps of every case: shows that it runs, measures nothing")
    made.add_argument("--out", type=Path, default=Path("runs/bench/rehearsal.json"), help="default runs/bench/rehearsal.json")
    return made


def sampled(model: Path, file: Path, count: int) -> Path:
    """Write `count` documents that the model samples at temperature 1, from seed 0."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from stages.evaluation.likelihood import SEPARATOR

    writer, tokenizer = AutoModelForCausalLM.from_pretrained(model).eval(), AutoTokenizer.from_pretrained(model)
    start = torch.full((count, 1), tokenizer.bos_token_id)
    torch.manual_seed(0)
    with torch.no_grad():
        written = writer.generate(start, attention_mask=torch.ones_like(start), do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=TOKENS, pad_token_id=0)
    file.write_text(f"\n{SEPARATOR}\n".join(tokenizer.decode(row[1:], skip_special_tokens=True) for row in written))
    return file


def held_out(sample: Path, file: Path) -> Path:
    """Write the last stories of the sample."""
    from stages.evaluation.likelihood import SEPARATOR

    stories = [story.strip() for story in sample.read_text().split(SEPARATOR) if story.strip()]
    file.write_text(f"\n{SEPARATOR}\n".join(stories[-HELD_OUT:]))
    return file


def settings(assets: Path, work: Path, case: str, seed: int, texts: dict[str, Path], steps: int | None) -> dict[str, Any]:
    """The stage config of one run."""
    train: dict[str, Any] = {"epochs": 1, "max_steps": steps, "batch_size": BATCH, "micro_batch_size": BATCH, "learning_rate": 5e-4, "log_every": 10, "eval_every": 1000}
    if case in WEIGHTS:
        train["rehearsal"] = {"data": str(texts["general"]), "share": GENERAL / BATCH, "tokens": 128, "weight": WEIGHTS[case]}
    name = "".join(letter if letter.isalnum() else "-" for letter in f"{case} {seed}")
    return {
        "name": name, "registry": str(work / "registry"), "output": str(work / name), "init_from": str(assets / "models" / "stories260K_hf"), "seed": seed,
        "data": str(assets / "data" / "sft" / "rasbt_instruction_data.json"), "template": "plain", "max_length": 256, "split": {"validation": 0.1, "test": 0.1},
        "train": train, "health": {"plain_text": str(texts["held_out"]), "max_perplexity_growth": 100.0},
    }  # fmt: skip


def trained(values: dict[str, Any]) -> dict[str, Any]:
    """Train by this config: optimizer steps, task loss on the validation rows, perplexity of the stories before and after."""
    from configs.schema import SFTStage
    from stages import sft
    from stages.registry import Registry

    sft.main(SFTStage.model_validate(values))
    published = Registry(values["registry"]).resolve(f"sft/{values['name']}")
    forgotten = published.info("stage_info")["forgetting"]
    general = GENERAL if values["train"].get("rehearsal") else 0
    steps = values["train"]["max_steps"] or math.ceil(published.info("data")["rows"]["train"] / (BATCH - general))
    return {"steps": steps, "loss": published.info("metrics")["loss"], "perplexity": forgotten["perplexity"], "start": forgotten["perplexity_at_start"]}


def rows(found: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The table's cells: means over the seeds of each case. Costs and what is kept are relative to the cases without rehearsal."""
    means = {}
    for case in (EPOCH, EQUAL, *WEIGHTS):
        runs = [run for run in found if run["case"] == case]
        means[case] = {key: fmean(run[key] for run in runs) for key in ("steps", "loss", "perplexity", "start")} | {"seeds": len(runs)}
    cells = []
    for case, mean in means.items():
        kept = 1 - (mean["perplexity"] - mean["start"]) / (means[EQUAL]["perplexity"] - means[EQUAL]["start"])
        costs = [f"{mean['loss'] / means[other]['loss'] - 1:+.1%}" if case in WEIGHTS else "" for other in (EPOCH, EQUAL)]
        cells.append([
            case, str(mean["seeds"]), f"{mean['steps']:.0f}", f"{mean['loss']:.3f}", *costs, f"{mean['perplexity']:.2f}", f"{mean['perplexity'] - mean['start']:+.2f}",
            f"{kept:.0%}" if case in WEIGHTS else "",
        ])  # fmt: skip
    return cells


def table(found: Sequence[dict[str, Any]]) -> Any:
    """A rich table of all cases."""
    from rich.table import Table

    made = Table(title="Rehearsal of the base model's own samples (task loss: nats per token of the validation rows)")
    for name in ("general text", "seeds", "steps", "task loss", "for an epoch", "at equal steps", "perplexity", "forgotten", "forgotten less"):
        made.add_column(name, justify="left" if name == "general text" else "right")
    for cells in rows(found):
        made.add_row(*cells)
    return made


if __name__ == "__main__":
    sys.exit(main())
