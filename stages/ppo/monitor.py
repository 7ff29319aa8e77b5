"""When a run is at its best, and when it should stop: pure logic over the evaluations it has seen.

Every evaluation completes the same prompts with the same sampling noise, so two of them are compared completion by completion,
and the standard error of a difference treats the prompt as the unit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from stages.evaluation.statistics import Estimate, mean_and_se, student_t_tail
from stages.registry.best import lower_is_better

KL = "evaluation/kl"
OVER_OPTIMISATION = "over_optimisation"


class Scored(NamedTuple):
    """One evaluation's scores of N completions, always in the same order."""

    iteration: int
    proxy: tuple[float, ...]  # [N] what PPO trains on
    heldout: tuple[float, ...]  # [N] what it does not train on


class Observation(NamedTuple):
    """What an evaluation found."""

    scored: Scored
    metrics: dict[str, float]
    finite: bool = True  # whether every trained weight is a finite number


@dataclass(frozen=True)
class Rules:
    """What the config says of best and stopping, and the prompts' numbers [N] behind the completions."""

    metric: str
    groups: Sequence[int]
    evaluations: int  # planned for the whole run, the one before the first iteration included
    kl_budget: float | None = None
    patience: int | None = None
    over_optimisation: float | None = None  # None also where the held-out scores are the training scores
    tolerated_fall: float = 0.1

    @property
    def name(self) -> str:
        """The metric's name without the sign."""
        return self.metric.removeprefix("-")

    @property
    def sign(self) -> int:
        """-1 where lower is better."""
        return -1 if self.metric.startswith("-") or lower_is_better(self.name.removesuffix("_k3")) else 1


@dataclass(frozen=True)
class State:
    """Everything a run remembers of its evaluations; it is part of every save."""

    key: str  # of the prompts, samples and scorers: other ones can't be compared with these
    history: tuple[dict[str, float], ...] = ()  # metrics of every evaluation, with its iteration
    start: Scored | None = None
    peak: Scored | None = None  # where the held-out score was highest
    bests: tuple[int, ...] = ()  # iterations that were the best so far, in turn
    stopped: str | None = None

    def as_json(self) -> dict[str, Any]:
        """For a save; floats survive it to the bit."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> State:
        """What `as_json` gave."""
        scored = {k: Scored(v[0], tuple(v[1]), tuple(v[2])) if (v := saved[k]) else None for k in ("start", "peak")}
        return cls(**{**saved, **scored, "history": tuple(saved["history"]), "bests": tuple(saved["bests"])})

    def kept(self, each: int) -> tuple[int, ...]:
        """The bests that may still be published, in turn: the newest `each`, and the newest `each` of those not after the peak, for the run may yet stop as
        over-optimised. A later peak allows only bests that are the newest then."""
        until = [iteration for iteration in self.bests if self.peak is None or iteration <= self.peak.iteration]
        return tuple(sorted({*self.bests[-each:], *until[-each:]}))

    def under(self, rules: Rules) -> State:
        """The same past where `rules` may have become stricter: a best policy above a lowered KL budget is none any more."""
        allowed = {metrics["iteration"] for metrics in self.history if within_budget(metrics, rules)}
        return replace(self, bests=tuple(iteration for iteration in self.bests if iteration in allowed))

    def value(self, iteration: int, name: str) -> float:
        """A metric of the evaluation at `iteration`."""
        return next(metrics[name] for metrics in self.history if metrics["iteration"] == iteration)


class Decision(NamedTuple):
    """What follows from an evaluation: whether it is the best so far, and why the run stops (a name and a sentence), if it does."""

    best: bool
    stop: str | None = None
    why: str = ""


def see(state: State, seen: Observation, rules: Rules) -> tuple[State, Decision]:
    """Take in one evaluation. The best is the first with the highest metric among those within the KL budget; where the run stops for over-optimisation,
    among those not after the peak of the held-out score: the metric may be the training score, which rises with it."""
    best = seen.finite and within_budget(seen.metrics, rules) and _is_better(state, seen.metrics, rules)
    stop, why = _reason_to_stop(state, seen, rules, best)
    higher = state.peak is None or np.mean(seen.scored.heldout) > np.mean(state.peak.heldout)
    bests = (*state.bests, seen.scored.iteration) if best else state.bests
    if stop == OVER_OPTIMISATION:
        assert state.peak is not None
        bests, best = tuple(iteration for iteration in bests if iteration <= state.peak.iteration), False
    after = replace(
        state,
        history=(*state.history, {"iteration": seen.scored.iteration, **seen.metrics}),
        start=state.start or seen.scored,
        peak=seen.scored if higher else state.peak,
        bests=bests,
        stopped=stop,
    )
    return after, Decision(best, stop, why)


def within_budget(metrics: dict[str, float], rules: Rules) -> bool:
    """Whether an evaluation's KL allows its policy to be published; a KL that is not finite never does."""
    return math.isfinite(metrics[KL]) and (rules.kl_budget is None or metrics[KL] <= rules.kl_budget)


def _is_better(state: State, metrics: dict[str, float], rules: Rules) -> bool:
    value = metrics[rules.name]
    if not math.isfinite(value):
        return False
    return not state.bests or rules.sign * value > rules.sign * state.value(state.bests[-1], rules.name)


def _reason_to_stop(state: State, seen: Observation, rules: Rules, best: bool) -> tuple[str | None, str]:
    """The name of the reason and a sentence, or (None, "")."""
    if rules.kl_budget is not None and not within_budget(seen.metrics, rules):
        return "kl_budget", f"KL {seen.metrics[KL]:.2f} nats per completion is above stopping.kl_budget {rules.kl_budget:g}"
    fall = over_optimised(state, seen.scored, rules)
    if fall is not None:
        assert state.peak is not None
        rise = float(np.mean(seen.scored.proxy) - np.mean(state.peak.proxy))
        return OVER_OPTIMISATION, (
            f"the held-out score has fallen by {fall.mean:.3f}±{fall.se or 0:.3f} since iteration {state.peak.iteration}, "
            f"while the training score has risen by {rise:.3f}"
        )
    waited = 0 if best else len(state.history) + 1 - _evaluations_until_best(state)
    if rules.patience is not None and waited >= rules.patience:
        return "patience", f"no better {rules.metric} in {rules.patience} evaluations"
    return None, ""


def _evaluations_until_best(state: State) -> int:
    """How many evaluations there were when the best one had been made; 1 where none was fit to be the best."""
    return next((n for n, metrics in enumerate(state.history, 1) if state.bests and metrics["iteration"] == state.bests[-1]), 1)


def over_optimised(state: State, now: Scored, rules: Rules) -> Estimate | None:
    """The fall of the held-out score since its peak and its standard error, where it is over-optimisation; else None.

    It is where the training score is higher than at the peak, and the held-out score, compared completion by completion, has lost
    more than `tolerated_fall` of its gain since the start: the mean over completions of
    peak - now - tolerated_fall · (peak - start) is above 0 in a one-sided t test clustered by prompt. Looking again and again and
    taking the highest of several as the peak would find falls in noise; the level is therefore divided by the number of pairs of
    evaluations in the run (Bonferroni), which bounds the chance of stopping a run whose held-out score never falls.
    """
    if rules.over_optimisation is None or state.start is None or state.peak is None or rules.evaluations < 2:
        return None
    start, peak, heldout = (np.asarray(x.heldout) for x in (state.start, state.peak, now))
    if not np.mean(now.proxy) > np.mean(state.peak.proxy):
        return None
    excess = mean_and_se(peak - heldout - rules.tolerated_fall * (peak - start), rules.groups)
    if excess.se is None or not excess.mean > 0:  # a single prompt says nothing of others
        return None
    chance = student_t_tail(excess.mean / excess.se, len(set(rules.groups)) - 1) if excess.se > 0 else 0.0
    pairs = rules.evaluations * (rules.evaluations - 1) / 2
    return mean_and_se(peak - heldout, rules.groups) if chance < rules.over_optimisation / pairs else None
