"""What a PPO run shows: metrics of an iteration, one line for a person, one JSON line for machines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from configs.schema import PPOStage
from stages.ppo import maths
from stages.ppo.collect import Clock
from stages.ppo.rollout import Experience, Rollout
from stages.training.progress import duration
from stages.training.resume import write_durably


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
        "rollout/tokens_per_second": tokens / max(clock.rollout, 1e-9),
        "rollout/samples_per_second": count / seconds,
        "time/rollout": clock.rollout,
        "time/scoring": clock.scoring,
        "time/update": clock.update,
    }


def sampler_metrics(rollout: Rollout, cfg: PPOStage) -> dict[str, float]:
    """The engine's log-probs against the training forward's: nats over real tokens, and the importance weights they call for."""
    cap = cfg.engine.importance_cap if cfg.engine.importance_cap is not None else float("inf")
    gap = maths.sampler_gap(rollout.old_logprobs, rollout.sampler_logprobs, rollout.tokens.mask, cap=cap)
    return {
        "rollout/sampler_gap": gap.largest, "rollout/sampler_gap_mean": gap.mean, "rollout/sampler_kl": gap.kl,
        "rollout/importance_weight": gap.weight, "rollout/importance_truncated": gap.truncated,
    }  # fmt: skip


def part_means(rollout: Rollout, scorers: Sequence[str]) -> dict[str, float]:
    """Each scorer's own mean over the completions it applies to; one that applies to none has no mean."""
    columns = zip(scorers, rollout.parts.T, rollout.parts_mask.T, strict=True)
    return {f"objective/score/{name}": float(values[mask].mean()) for name, values, mask in columns if mask.any()}


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
        f"({m['rollout/tokens_per_second']:.0f} tokens/s; {m['time/rollout']:.1f}+{m['time/scoring']:.1f}+{m['time/update']:.1f} s "
        f"rollout+scoring+update)  {duration(seconds_left)} left"
    )


def lines_of(path: Path) -> list[dict[str, float]]:
    """The lines of a metrics file up to one that a kill has torn: nothing after it can be trusted."""
    found = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(dict(json.loads(text)))
        except ValueError:
            break
    return found


class MetricsFile:
    """OUTPUT/metrics.jsonl; a resumed run first drops the lines of iterations that it will do again."""

    def __init__(self, path: Path, first_iteration: int) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.lines = [line for line in lines_of(path) if line.get("iteration", first_iteration + 1) <= first_iteration]
        write_durably(path, "".join(json.dumps(line) + "\n" for line in self.lines))

    def add(self, iteration: int, metrics: dict[str, float]) -> None:
        """Append the metrics of the iteration with this number, counted from 1."""
        self.lines.append({"iteration": iteration} | metrics)
        with self.path.open("a") as stream:
            stream.write(json.dumps(self.lines[-1]) + "\n")

    def last(self) -> dict[str, float]:
        """The newest line's metrics, for a run that was complete but for its publication."""
        return self.lines[-1] if self.lines else {}
