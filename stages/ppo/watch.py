"""Watches a run: evaluates the policy, keeps the best one, says when to stop, and chooses what is published."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from configs.errors import UserError
from configs.schema import PPOStage
from stages.ppo import evaluation, report, state
from stages.ppo.build import PPOModels
from stages.ppo.evaluation import EvaluationSet
from stages.ppo.monitor import KL, OVER_OPTIMISATION, Observation, Rules, Scored, State, see, within_budget
from stages.ppo.published import Published
from stages.ppo.store import Store
from stages.tokens import ModelTokens
from stages.training import watchdog
from stages.training.ranks import say
from stages.training.saves import KEPT


class Outcome(NamedTuple):
    """What a run has come to: the iteration that is published, why it stopped early if it did, and the record for the manifest."""

    iteration: int
    stopped: str | None
    record: dict[str, Any]


class Watch:
    """The evaluations of one run. Every process sees the same completions, so every one of them decides alike; rank 0 writes.

    `store` keeps the best policies, `saved` is what `record` gave to the save that the run continues from.
    """

    def __init__(
        self, cfg: PPOStage, accelerator: Any, built: PPOModels, tokens: ModelTokens, chosen: EvaluationSet | None, *,
        store: Store, logs: report.Logs, saved: dict[str, Any] | None, published: Published,
    ) -> None:  # fmt: skip
        self.cfg, self.accelerator, self.built, self.tokens, self.chosen = cfg, accelerator, built, tokens, chosen
        self.store, self.folder, self.logs, self.published = store, store.folder, logs, published
        self.state: State | None = None
        if chosen is not None and cfg.evaluation is not None:
            self.rules, key = rules_of(cfg, chosen), f"{chosen.fingerprint} {cfg.evaluation.model_dump_json()}"
            if not published.is_the_policy:  # what was evaluated and kept before a change of these is not what is now
                key += f" ema_decay {cfg.ema_decay} towards_start {cfg.towards_start}"
            self.state = State.from_json(saved).under(self.rules) if saved is not None and saved["key"] == key else State(key)

    @property
    def stopped(self) -> str | None:
        """The name of the reason why the run has stopped, if it has."""
        return self.state.stopped if self.state is not None else None

    def record(self) -> dict[str, Any] | None:
        """What a save has to hold, so that a resumed run decides as this one does."""
        return self.state.as_json() if self.state is not None else None

    def begin(self, iteration: int) -> None:
        """Evaluate the policy that the run starts from, unless that was done before it was interrupted."""
        if self.state is not None and not self.state.history:
            if self.accelerator.is_main_process:
                state.forget_bests(self.folder, [])
            metrics, text = self._look(iteration)
            self.logs.add(iteration, metrics)
            say(text)

    def look(self, iteration: int) -> tuple[dict[str, float], str]:
        """Evaluate after so many iterations, where that is due: metrics, and the text that shows them."""
        if self.cfg.evaluation is None or self.state is None:
            return {}, ""
        due = iteration % self.cfg.evaluation.every == 0 or iteration == self.cfg.train.iterations
        return self._look(iteration) if due else ({}, "")

    def _look(self, iteration: int) -> tuple[dict[str, float], str]:
        with watchdog.during("eval"), self.published.in_place():  # what is published is what is evaluated
            return self._evaluate(iteration)

    def _evaluate(self, iteration: int) -> tuple[dict[str, float], str]:
        assert self.state is not None
        assert self.chosen is not None
        groups, before = self.chosen.groups, self.state
        written = evaluation.complete(self.built, self.chosen, self.cfg, self.accelerator, self.tokens)
        metrics = evaluation.metrics_of(written, groups, before.start.heldout if before.start else None, self.cfg)
        if self.rules.name not in metrics:
            raise UserError(f"evaluation.metric: there is no {self.rules.name!r}; there are {', '.join(sorted(metrics))}")
        scored = Scored(iteration, tuple(w.proxy for w in written), tuple(w.heldout for w in written))
        finite = self.store.is_finite()
        self.state, decision = see(before, Observation(scored, metrics, finite), self.rules)
        self.logs.add_samples(iteration, written)
        if decision.best:
            self.store.save_best(iteration, self.state.kept(KEPT))
        self.accelerator.wait_for_everyone()
        if decision.stop and not self.state.bests:
            remedy = "raise stopping.kl_budget or start closer to the reference" if decision.stop == "kl_budget" else f"no evaluation before that had a {self.rules.name} to choose by"
            raise UserError(f"no policy of this run may be published: at iteration {iteration}, {decision.why}; {remedy}")
        return metrics, report.evaluation_text(iteration, self.cfg, metrics, written, self.chosen, decision)

    def conclude(self, iteration: int) -> Outcome:
        """Put the policy to publish into the module: the best one, else the last.

        Raises:
            UserError: the last one is above the KL budget and none of the better ones can be read.
        """
        self.published.put_in_place()
        if self.state is None:
            return Outcome(iteration, None, {"published_iteration": iteration})
        published = self._load_best(iteration)
        known = [metrics for metrics in self.state.history if metrics["iteration"] == published]
        value = known[0][self.rules.name] if known else None
        record = {
            "published_iteration": published, "last_iteration": iteration, "stopped": self.stopped, "best_metric": self.rules.metric,
            "best_value": value,
            "heldout_peak": self.state.peak.iteration if self.state.peak is not None else None,
            "evaluations": [{k: v if math.isfinite(v) else None for k, v in metrics.items()} for metrics in self.state.history],
        }  # fmt: skip
        say(f"ppo: publishing iteration {published} of {iteration}" + ("" if value is None else f", {self._chosen_by()}: {value:.4g}"))
        return Outcome(published, self.stopped, record)

    def _chosen_by(self) -> str:
        """Why the published policy was chosen, in words."""
        assert self.state is not None
        best = f"the best by {self.rules.metric}"
        if self.stopped != OVER_OPTIMISATION or self.state.peak is None:
            return best
        return f"{best} up to iteration {self.state.peak.iteration}, where the held-out score was highest (what came later was over-optimised)"

    def _load_best(self, iteration: int) -> int:
        """The newest best policy that can be read."""
        assert self.state is not None
        for best in reversed(self.state.bests):
            with watchdog.during("load"):
                why = None if best == iteration else self.store.load_best(best)
            if why is None:
                return best
            say(f"ppo: the best policy, of iteration {best}, can't be used: {why}; falling back to an older one")
        last = self.state.history[-1]
        if self.stopped == OVER_OPTIMISATION:
            raise UserError(f"none of the best policies can be read, and the last one is over-optimised: its held-out score has fallen; delete {self.folder} and run again")
        if last["iteration"] == iteration and not within_budget(last, self.rules):
            raise UserError(f"none of the best policies can be read, and the last has a KL of {last[KL]:.2f} nats, which stopping.kl_budget does not allow; delete {self.folder} and run again")
        say(f"ppo: none of the best policies can be used; the last one is published, of iteration {iteration}")
        return iteration


def rules_of(cfg: PPOStage, chosen: EvaluationSet) -> Rules:
    """The monitor's rules as the config has them. Without scorers of their own evaluations can't tell over-optimisation."""
    assert cfg.evaluation is not None
    iterations, every = cfg.train.iterations, cfg.evaluation.every
    return Rules(
        metric=cfg.evaluation.metric, groups=tuple(chosen.groups), evaluations=1 + -(-iterations // every), kl_budget=cfg.stopping.kl_budget,
        patience=cfg.stopping.patience, over_optimisation=cfg.stopping.over_optimisation if cfg.evaluation.scorers is not None else None,
        tolerated_fall=cfg.stopping.tolerated_fall,
    )  # fmt: skip
