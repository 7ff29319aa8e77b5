"""What a PPO run shows: metrics of an iteration, one line for a person, one JSON line for machines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.schema import PPOStage
from rewards.combine import SPREAD
from stages.ppo import maths
from stages.ppo.collect import Clock
from stages.ppo.evaluation import EvaluationSet, Written
from stages.ppo.monitor import Decision
from stages.ppo.rollout import Experience, Rollout
from stages.training.lines import Appended
from stages.training.progress import duration
from stages.training.saves import write_durably

COMPARED = "rollout/sampler_compared"  # tokens whose log-prob by the sampler was compared with a training forward's


def metrics_of(
    rollout: Rollout, experience: Experience, rewards: Tensor, cfg: PPOStage, *, kl_coef: float, clock: Clock, scorers: Sequence[str]
) -> dict[str, float]:
    """Metrics over real tokens and over completions; KL is summed over a completion, in nats. `scorers` names the columns of rollout.parts."""
    mask = rollout.tokens.mask
    lengths = mask.sum(dim=1).float()
    tokens = max(float(lengths.sum()), 1.0)
    kl = maths.k1(rollout.old_logprobs, rollout.ref_logprobs, mask).sum(dim=1)
    count = len(rollout)
    seconds = max(clock.rollout + clock.scoring + clock.update, 1e-9)
    return {
        "objective/score": float(rollout.scores.mean()),
        "objective/score_se": float(rollout.scores.std(unbiased=True) / count**0.5) if count > 1 else 0.0,
        **part_means(rollout, scorers),
        "objective/kl": float(kl.mean()),
        "objective/kl_se": float(kl.std(unbiased=True) / count**0.5) if count > 1 else 0.0,
        "objective/kl_k3": float(maths.k3(rollout.old_logprobs, rollout.ref_logprobs, mask).sum(dim=1).mean()),
        "objective/reward": float(torch.where(experience.value_mask, rewards, 0.0).sum(dim=1).mean()),
        "objective/kl_coef": kl_coef,
        "policy/entropy": float(rollout.entropy.sum() / tokens),
        "value/explained_variance": maths.explained_variance(rollout.values, experience.returns, experience.value_mask),
        "rollout/length": float(lengths.mean()),
        "rollout/eos_rate": float(rollout.finished.float().mean()) if cfg.sampling.stop_at_eos else 0.0,
        "rollout/short_completions": float((lengths <= 1).float().mean()),
        **sampler_metrics(rollout, cfg),
        "rollout/samples_per_second": count / seconds,
        **speeds(count, tokens, clock),
        "time/rollout": clock.rollout,
        "time/scoring": clock.scoring,
        "time/update": clock.update,
    }


def speeds(count: int, tokens: float, clock: Clock) -> dict[str, float]:
    """Completions and their tokens per second of each part of an iteration, as if the iteration were that part alone: 1 / speed adds up over the parts.

    The update goes over them num_ppo_epochs times within its seconds. `rollout/samples_per_second` is of the whole iteration.
    """
    parts = {"rollout": clock.rollout, "scoring": clock.scoring, "update": clock.update}
    whole = {f"{part}/tokens_per_second": tokens / max(spent, 1e-9) for part, spent in parts.items()}
    return whole | {f"{part}/completions_per_second": count / max(spent, 1e-9) for part, spent in parts.items()}


def sampler_metrics(rollout: Rollout, cfg: PPOStage) -> dict[str, float]:
    """The engine's log-probs against the training forward's: nats over real tokens, and the importance weights they call for."""
    cap = cfg.engine.importance_cap if cfg.engine.importance_cap is not None else float("inf")
    gap = maths.sampler_gap(rollout.old_logprobs, rollout.sampler_logprobs, rollout.tokens.mask, cap=cap)
    return {
        "rollout/sampler_gap": gap.largest, "rollout/sampler_gap_mean": gap.mean, "rollout/sampler_kl": gap.kl, COMPARED: float(rollout.tokens.mask.sum()),
        "rollout/importance_weight": gap.weight, "rollout/importance_truncated": gap.truncated,
    }  # fmt: skip


def gap_to(forward: Rollout, cfg: PPOStage) -> dict[str, float]:
    """The gap alone, to a forward pass over the rollout; the weights are of what the update starts from."""
    return {key: value for key, value in sampler_metrics(forward, cfg).items() if "importance" not in key}


def sampler_gap_of(updates: dict[str, float]) -> dict[str, float]:
    """The same gap where the sampler's log-probs are the old ones: to the update's forward pass over the first minibatch, before its first step.

    A sample of the rollout, of `rollout/sampler_compared` tokens: its rows are drawn anew in every iteration.
    """
    return {
        "rollout/sampler_gap": updates["policy/first_gap"], "rollout/sampler_gap_mean": updates["policy/first_gap_mean"],
        "rollout/sampler_kl": updates["policy/first_approx_kl"], COMPARED: updates["policy/first_gap_tokens"],
    }  # fmt: skip


def part_means(rollout: Rollout, scorers: Sequence[str]) -> dict[str, float]:
    """Each scorer's own mean over the completions it applies to; one that applies to none has no mean. How far ensembles disagree is objective/score_spread."""
    columns = zip(scorers, rollout.parts.T, rollout.parts_mask.T, strict=True)
    key = {SPREAD: "objective/score_spread"}
    return {key.get(name, f"objective/score/{name}"): float(values[mask].mean()) for name, values, mask in columns if mask.any()}


def score_clipped(rollout: Rollout, cfg: PPOStage, *, mean: float, std: float) -> float:
    """Share of the completions whose score, centred and scaled as `cfg` says, lies at the clip or beyond it."""
    if cfg.score_clip is None:
        return 0.0
    centred = (rollout.scores - (mean if cfg.center_scores else 0.0)) / (std if cfg.scale_scores else 1.0)
    return float((centred.abs() >= cfg.score_clip).float().mean())


def line(iteration: int, cfg: PPOStage, metrics: dict[str, float], seconds_left: float) -> str:
    """One readable line per iteration."""
    m = metrics
    return (
        f"ppo {iteration + 1}/{cfg.train.iterations}  score {m['objective/score']:+.3f}±{m['objective/score_se']:.3f}  "
        f"kl {m['objective/kl']:.2f} (k3 {m['objective/kl_k3']:.2f})  length {m['rollout/length']:.1f}  eos {m['rollout/eos_rate']:.0%}  "
        f"clip {m['policy/clip_fraction']:.0%}  ev {m['value/explained_variance']:+.2f}  {m['rollout/samples_per_second']:.1f} samples/s "
        f"(rollout, scoring, update: {m['time/rollout']:.1f}, {m['time/scoring']:.1f}, {m['time/update']:.1f} s; {m['rollout/tokens_per_second']:.0f}, "
        f"{m['scoring/tokens_per_second']:.0f}, {m['update/tokens_per_second']:.0f} tokens/s)  {duration(seconds_left)} left"
    )


def lines_of(path: Path) -> list[dict[str, Any]]:
    """The JSON lines of a file, each with its iteration, up to one that a kill has torn: nothing after it can be trusted."""
    found = []
    for text in path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []:
        try:
            row = dict(json.loads(text))
        except ValueError:
            break
        if "iteration" not in row:
            break
        found.append(row)
    return found


def evaluation_line(iteration: int, cfg: PPOStage, metrics: dict[str, float], best: bool) -> str:
    """One readable line per evaluation."""
    m = metrics

    def shown(name: str, digits: int) -> str:
        se = m.get(f"evaluation/{name}_se")
        return f"{m[f'evaluation/{name}']:+.{digits}f}" + ("" if se is None else f"±{se:.{digits}f}")

    return (
        f"ppo {iteration}/{cfg.train.iterations}  evaluation: held-out score {shown('heldout_score', 3)}  score {shown('score', 3)}  "
        f"kl {shown('kl', 2)} (k3 {m['evaluation/kl_k3']:.2f})  length {m['evaluation/length']:.1f}  eos {m['evaluation/eos_rate']:.0%}  "
        f"win rate {m['evaluation/win_rate']:.0%} [{m['evaluation/win_rate_low']:.0%}, {m['evaluation/win_rate_high']:.0%}]"
        + ("  (best so far)" if best else "")
    )


def evaluation_text(
    iteration: int, cfg: PPOStage, metrics: dict[str, float], written: Sequence[Written], chosen: EvaluationSet, decision: Decision
) -> str:
    """An evaluation's line, a few samples, and why the run stops, if it does."""
    assert cfg.evaluation is not None
    lines = [evaluation_line(iteration, cfg, metrics, decision.best), *sample_table(written, chosen.samples, cfg.evaluation.show_samples)]
    if decision.stop:
        lines.append(f"ppo: stopped after iteration {iteration} of {cfg.train.iterations}: {decision.stop}: {decision.why}")
    return "\n".join(lines)


def sample_table(written: Sequence[Written], samples: int, prompts: int) -> list[str]:
    """The first completion of the first prompts, one line each, with both scores."""
    shown = [written[n * samples] for n in range(min(prompts, len(written) // samples))]
    return [f"    {_short(w.prompt, 40)!r} -> {_short(w.completion, 80)!r}  held-out {w.heldout:+.2f}, score {w.proxy:+.2f}" for w in shown]


def _short(text: str, characters: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= characters else text[: characters - 1] + "…"


class Lines:
    """A file of JSON lines, each with its iteration; a resumed run first drops the lines of iterations that it will do again."""

    def __init__(self, path: Path, resumed_at: int | None) -> None:
        self.path, self.lines = path, Appended(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.kept = [] if resumed_at is None else [row for row in lines_of(path) if row["iteration"] <= resumed_at]
        if path.exists():  # a run without evaluations has no samples
            write_durably(path, "".join(_json(row) for row in self.kept))

    def add(self, *rows: dict[str, Any]) -> None:
        """Append rows; on a full disk they wait for room, and the run goes on."""
        self.lines.add("".join(_json(row) for row in rows))


def _json(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


class Logs:
    """OUTPUT/metrics.jsonl and OUTPUT/samples.jsonl, written by rank 0 alone; `resumed_at` is None where a run starts anew."""

    def __init__(self, output: Path, resumed_at: int | None, *, main: bool) -> None:
        self.metrics = Lines(output / "metrics.jsonl", resumed_at) if main else None
        self.samples = Lines(output / "samples.jsonl", resumed_at) if main else None
        self.rows: list[dict[str, Any]] = self.metrics.kept if self.metrics is not None else []

    @property
    def iterations(self) -> list[dict[str, float]]:
        """The metrics of the iterations so far; the line of an evaluation alone, which a run makes of what it starts or goes on from, is none."""
        return [row for row in self.rows if "objective/score" in row]

    def add(self, iteration: int, metrics: dict[str, float]) -> None:
        """Append the metrics of the iteration with this number, counted from 1, or of an evaluation of what it led to (0: of the start)."""
        if self.metrics is not None:
            self.rows.append({"iteration": iteration} | metrics)
            self.metrics.add(self.rows[-1])

    def add_samples(self, iteration: int, written: Sequence[Written]) -> None:
        """Append every completion of an evaluation."""
        if self.samples is not None:
            self.samples.add(*({"iteration": iteration} | w._asdict() for w in written))

    def of(self, iteration: int) -> dict[str, float]:
        """What the lines of an iteration say, on rank 0."""
        found = [row for row in self.rows if row["iteration"] == iteration]
        return {key: value for row in found for key, value in row.items() if key != "iteration"}
