"""What came out of a chain: OUTPUT/summary.json, the table, where the checkpoints lie, and what to try next."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.chain.decide import read_json
from launch.chain.progress import duration
from launch.chain.steps import sections, stage_of

if TYPE_CHECKING:
    from launch.chain.decide import Decider

REWARD_FIGURES = ("accuracy", "best_shortcut", "ece")


def finish(chain: Any, decider: Decider, seconds: float, quiet: bool = False) -> dict[str, Any]:
    """Write OUTPUT/summary.json from the evaluation's results and the reward model's metrics; print it all unless `quiet`.

    Returns {"seconds", "models": {label: {"gold", "gold_se", "win_rate_vs_sft", "win_rate_ci", "kl", "length"}}, "reward":
    {"accuracy", "best_shortcut", "ece"}} (means over the members of an ensemble): gold is the evaluation's score, kl the k1 estimate in nats per completion to the model that
    win rates are counted against (SFT where the chain has it), length in tokens; None where it was not measured.
    """
    results = read_json(chain.output / "eval" / "results.json") if chain.eval is not None else {}
    rewards = [decider.results[name] for name in sections(chain) if stage_of(name) == "reward" and name in decider.results]
    summary = {
        "seconds": round(seconds, 1),
        "models": {label: figures_of(figures) for label, figures in results.get("models", {}).items()},
        "reward": reward_figures([reward.info("metrics") or {} for reward in rewards]),
    }
    part = chain.output / f".summary.{os.getpid()}"
    part.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    os.replace(part, chain.output / "summary.json")
    if not quiet:
        show(chain, decider, results, summary)
    return summary


def reward_figures(members: list[dict[str, Any]]) -> dict[str, Any]:
    """The reward model's figures from its metrics, or their means over an ensemble's members; {} without one."""
    known = {name: [metrics[name] for metrics in members if metrics.get(name) is not None] for name in REWARD_FIGURES}
    return {name: sum(values) / len(values) if values else None for name, values in known.items()} if members else {}


def figures_of(figures: dict[str, Any]) -> dict[str, Any]:
    """One model's row of the summary, from its figures in the evaluation's results."""
    kl = figures.get("kl")
    return {
        "gold": figures["score"]["mean"],
        "gold_se": figures["score"]["se"],
        "win_rate_vs_sft": figures.get("win_rate"),
        "win_rate_ci": figures.get("win_rate_ci"),
        "kl": None if kl is None else kl["k1"],
        "length": figures.get("length"),
    }


def show(chain: Any, decider: Decider, results: dict[str, Any], summary: dict[str, Any]) -> None:
    """Print the table, dialogues side by side, the reward model's figures, the checkpoints and the next commands."""
    print()
    if results.get("models"):
        from stages.evaluation import table

        table.show(results)
    for line in closing_lines(chain, decider, summary):
        print(line)


def closing_lines(chain: Any, decider: Decider, summary: dict[str, Any]) -> list[str]:
    """The lines under the table."""
    lines = []
    reward = summary["reward"]
    if reward.get("accuracy") is not None:
        figures = [f"accuracy {reward['accuracy']:.3f}"]
        figures += [f"best shortcut {reward['best_shortcut']:.3f}"] if reward["best_shortcut"] is not None else []
        figures += [f"calibration error {reward['ece']:.3f}"] if reward["ece"] is not None else []
        lines.append(f"reward model: {', '.join(figures)}")
    lines.append("checkpoints:")
    made = [(name, decider.results[name]) for name in sections(chain) if name in decider.results]
    lines += [f"  {checkpoint.ref:<20} {_short(checkpoint.model_dir)}" for _, checkpoint in made]
    lines.append(f"summary: {chain.output / 'summary.json'}   time: {duration(summary['seconds'])}")
    lines.append("next:")
    lines.append(f"  align registry list --registry {chain.registry}")
    if made:
        lines.append(f"  align registry lineage {made[-1][1].ref} --registry {chain.registry}")
    if chain.eval is not None and (chain.output / "eval" / "config.yaml").is_file():
        lines.append(f"  less {chain.output / 'eval' / 'samples.jsonl'}")
    if chain.ppo is not None:
        lines.append(f"  align run {chain.output / 'chain.yaml'} ppo.kl_coef={chain.ppo.kl_coef * 2 or 0.05:g}   # a stronger tie to the SFT model")
    return lines


def _short(path: Path) -> str:
    """A path as seen from the working directory, where that is shorter."""
    relative = os.path.relpath(path)
    return relative if len(relative) < len(str(path)) else str(path)
